"""Files and folders that are old or whole, never half written, however the process that writes them ends.

What is written lies in a hidden folder beside its place until it is whole and on the disk, and then takes that place
in one step. The hidden folder holds a lock that dies with its process; whoever writes into the same folder later
removes what dead ones have left.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from reknow.errors import InputError
from reknow.files.locks import write_lock
from reknow.files.strict_json import strict_json

HIDDEN = ".reknow-"
"""How the names of hidden folders begin; each has a `lock`, what is `new`, and in `old` what had to make room."""


def atomic_write(path: str | Path, write: Callable[[str], object]) -> Path:
    """Calls `write` with a name to write to, and puts the file into its place when it is whole.

    Raises:
        InputError: it cannot be written, or its place is taken by something else than a file.
    """
    with _place_to_write(path) as place:
        if place.exists() and not place.is_file():
            raise InputError(f"expected a file to replace; {path} is none: choose another name")
        with _hidden_folder(place) as hidden:
            new = hidden / "new" / place.name
            write(str(new))
            _flush(hidden, new)
            os.replace(new, place)
            _sync(place.parent)
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Writes a UTF-8 text as in `atomic_write`."""
    return atomic_write(path, lambda new: Path(new).write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> Path:
    """Writes a JSON file atomically."""
    return write_text(path, strict_json(value, indent=1, ensure_ascii=False, default=str))


def append_line(path: str | Path, text: str) -> Path:
    """Adds a line to a UTF-8 file; when this returns it is on the disk.

    Raises:
        InputError: it cannot be written; nothing of it stays in the file.
    """
    with _place_to_write(path) as place:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place, "ab", buffering=0) as file:
            size, left = file.tell(), memoryview(text.encode() + b"\n")
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
    return Path(path)


def atomic_write_folder(folder: str | Path, write: Callable[[Path], None], overwrite: bool) -> Path:
    """Calls `write` with an empty folder to fill, and puts it into its place when it is whole.

    An old folder is exchanged for the new one in one step. Where system or disk have no such step, it is moved into
    the hidden folder first; if the process ends before the new one is in its place, `restore_interrupted` brings it
    back.

    Raises:
        InputError: it cannot be written, another process writes there, its place is taken by something else than a
            folder or a file, or there is one and `overwrite` is off.
    """
    with write_lock(folder), _place_to_write(folder) as place:
        if place.exists() and not overwrite:
            raise InputError(f"expected a new folder; {folder} exists: choose another name or overwrite it")
        if place.exists() and not (place.is_dir() or place.is_file()):
            raise InputError(f"expected a folder or a file to replace; {folder} is neither: choose another name")
        with _hidden_folder(place) as hidden:
            new = hidden / "new" / place.name
            new.mkdir()
            write(new)
            _flush(hidden, new)
            if not place.exists():
                os.rename(new, place)
            elif not _exchange(new, place):
                _in_two_steps(new, place, hidden / "old" / place.name)
            _sync(place.parent)
    return Path(folder)


def restore_interrupted(path: str | Path) -> None:
    """Brings back what a process that has died had moved away to make room at `path`, and has not replaced."""
    with suppress(OSError, ValueError):  # a name of the hub is no path
        place = Path(os.path.realpath(path))
        if not place.exists() and place.parent.is_dir():
            _sweep(place.parent)


@contextmanager
def _place_to_write(path: str | Path) -> Iterator[Path]:
    """The place that `path` names, behind symbolic links; what the system refuses there is an InputError."""
    try:
        yield Path(os.path.realpath(path))
    except InputError:
        raise
    except Exception as error:
        # Libraries in Rust raise errors of their own, with the system's number in the text.
        if not isinstance(error, (OSError, SafetensorError)) and "(os error " not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} could not be written ({reason}); what was there is intact: free space or choose another place"
        ) from error


@contextmanager
def _hidden_folder(place: Path) -> Iterator[Path]:
    """A hidden folder beside `place`, locked; empty again and gone at the end."""
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place.parent)
    hidden, lock = _make_hidden_folder(place.parent)
    try:
        for part in ("new", "old"):
            (hidden / part).mkdir()
        yield hidden
    finally:
        _restore(hidden)
        lock.release()
        shutil.rmtree(hidden, ignore_errors=True)


def _make_hidden_folder(parent: Path) -> tuple[Path, FileLock]:
    """A new hidden folder and its lock."""
    while True:
        hidden = Path(tempfile.mkdtemp(dir=parent, prefix=HIDDEN))
        lock = FileLock(hidden / "lock")
        try:
            lock.acquire(timeout=0)
        except (FileNotFoundError, Timeout):  # before it was locked, another process took it for a dead one's
            continue
        except OSError:  # a disk without locks, where nobody can sweep either
            return hidden, lock
        if (hidden / "lock").exists():
            return hidden, lock
        lock.release()


def _sweep(parent: Path) -> None:
    """Removes hidden folders of processes that have died; what they had moved away and not replaced comes back."""
    for hidden in parent.glob(f"{HIDDEN}*"):
        lock = FileLock(hidden / "lock")
        with suppress(OSError, Timeout):
            lock.acquire(timeout=0)
            _restore(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
            lock.release()


def _restore(hidden: Path) -> None:
    for old in (hidden / "old").glob("*"):
        if not (hidden.parent / old.name).exists():
            os.rename(old, hidden.parent / old.name)


def _in_two_steps(new: Path, place: Path, old: Path) -> None:
    os.rename(place, old)
    _sync(place.parent)
    os.rename(new, place)


def _exchange(one: Path, other: Path) -> bool:
    """Lets two paths swap what they name, in one step; False where this is not possible."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _flush(hidden: Path, new: Path) -> None:
    """Brings what is new to the disk, with the modes that the user's files have."""
    probe = hidden / "mode"
    probe.touch()
    mode = probe.stat().st_mode  # safetensors makes files that only their owner may read
    for path in (new, *new.rglob("*")) if new.is_dir() else (new,):
        if path.is_file():
            path.chmod(mode)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        else:
            _sync(path)


def _sync(folder: Path) -> None:
    """Brings the entries of a folder to the disk."""
    if os.name == "nt":  # has no such call
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
