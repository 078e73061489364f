"""One writer at a time for a file or folder: a lock that the system takes back when its process ends.

A reader takes none. On file systems without locks (some network ones) a file that names its process stands for the
lock, so after a kill on another machine it must be deleted by hand; where nothing can be written nothing is locked.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from reknow.errors import InputError

_log = logging.getLogger(__name__)

PATIENCE = 600.0
"""Seconds that a short change of what is there (a patch on a stack, an entry of a file) waits for its turn."""
_QUIET = 1.0
"""Seconds of waiting before that is said."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def write_lock(place: str | Path, *, wait: float = 0.0) -> Iterator[None]:
    """While open, nobody else who asks may write to the file or folder: no process, no thread but this one.

    Args:
        place: it need not exist; the lock is a hidden file beside it that goes when the lock does.
        wait: seconds to wait for another writer; `math.inf`: as long as it takes.

    Raises:
        InputError: another one writes there.
    """
    file = _lock_file(Path(os.path.realpath(place)))
    new = [] if file is None else [folder for folder in file.parents if not os.path.exists(folder)]
    lock = None if file is None else _take(file, place, wait)
    if file is None or lock is None:
        yield
        return
    try:
        if lock.lock_counter == 1 and isinstance(lock, FileLock):
            with suppress(OSError):  # without it a message says less
                file.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:
            _clear(file, new)
        lock.release()


def _clear(file: Path, new: list[Path]) -> None:
    """Removes the file of a lock that is still held: whoever waits for it sees that and takes a new one; and those of
    its folders that were made for it, if nothing else is in them."""
    with suppress(OSError):  # Windows keeps files that are open
        file.unlink()
        for folder in new:
            folder.rmdir()


def _lock_file(place: Path) -> Path | None:
    """Beside the place, or inside where only the folder itself can be written; None: nothing can."""
    above = next(folder for folder in place.parents if os.path.exists(folder)) if place.name else place
    if place.name and os.path.isdir(above) and os.access(above, os.W_OK):
        return place.with_name(f".{place.name}.lock")
    return place / ".lock" if os.path.isdir(place) and os.access(place, os.W_OK) else None


def _take(file: Path, place: str | Path, wait: float) -> BaseFileLock | None:
    """The lock, held; says for whom it waits. None where it cannot be made: nothing else can be written there either,
    and whoever tries says why."""
    try:
        try:
            return _acquire(file, min(wait, _QUIET))
        except Timeout:
            if wait <= _QUIET:
                raise
        _log.warning("waiting for %s, which writes to %s", _holder(file), place)
        return _acquire(file, wait - _QUIET)
    except Timeout:
        raise InputError(
            f"expected nobody else to write to {place}; {_holder(file)} does: wait until it ends, stop it, or choose "
            "another place"
        ) from None
    except OSError as error:
        if not os.path.lexists(file):
            return None
        raise InputError(
            f"expected {file}, which says who writes to {place}, to be ours to open; got {error.strerror or error}: "
            "delete it if nobody writes there, or choose another place"
        ) from error


def _acquire(file: Path, wait: float, kind: type[BaseFileLock] = FileLock) -> BaseFileLock:
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = kind(file, is_singleton=True)
    try:
        lock.acquire(timeout=-1 if math.isinf(wait) else wait)
    except Timeout:
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.exists(file.parent):
            return _acquire(file, wait, kind)  # who held it has taken the empty folder away
        if kind is not SoftFileLock and error.errno in _NO_LOCKS:
            return _acquire(file, wait, SoftFileLock)
        raise
    return lock


def _holder(file: Path) -> str:
    """Who holds the lock, as far as its file says."""
    try:
        process, host = file.read_text(encoding="utf-8").splitlines()[:2]
    except (OSError, ValueError):
        return "another process"
    return f"process {process}" if host == socket.gethostname() else f"process {process} on {host}"
