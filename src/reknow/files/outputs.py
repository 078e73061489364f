"""Where results may go: what a command may replace, and what it leaves alone.

Nothing takes the place of a device or the like. A folder takes the place of one that the same command wrote, known by
its files, with nothing in it that came later. What a command reads from is never replaced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from reknow.errors import InputError
from reknow.files.atomic import write_text
from reknow.files.strict_json import strict_json

MARK = "reknow.json"
"""In an exported folder: which command wrote it, which files, and what they are."""
STACK_FILE, MANIFEST_FILE, EDITOR_FILE = "stack.json", "manifest.json", "editor.safetensors"
HUB = "hub:"
"""How the address of a repository on the hub begins, which is read alone."""


def output_file(path: Path, force: bool, sources: Iterable[str | Path | None] = ()) -> Path:
    """The path of a file to write, with `~` resolved.

    Raises:
        InputError: no file can be written there, one exists and `force` is off, or it belongs to one of `sources`.
    """
    path = _check_free(path, force, sources)
    if path.exists() and not path.is_file():
        raise InputError(f"expected a file to replace; {path} is none: choose another name")
    return path


def output_folder(
    path: Path, force: bool, known: Callable[[Path], set[str]], sources: Iterable[str | Path | None] = ()
) -> Path:
    """The path of a folder to write whole, with `~` resolved; `known`: which files of a present one may be lost.

    Raises:
        InputError: no folder can be written there, one exists and `force` is off, it holds something else than
            `known`, or it belongs to one of `sources`.
    """
    path = _check_free(path, force, sources)
    check_replaced(path, known(path))
    here = Path.cwd()
    if path.resolve() in (here, *here.parents):
        raise InputError(f"expected a folder other than the one you are in; got {path}: choose another name")
    return path


def check_replaced(folder: Path, known: set[str]) -> None:
    """Raises InputError where the folder holds anything but `known` files, which would be lost; or is a device."""
    if folder.exists() and not (folder.is_dir() or folder.is_file()):
        raise InputError(f"expected a folder to replace; {folder} is none: choose another name")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known and not (path.is_dir() and not path.is_symlink()):
            raise InputError(
                "expected a new folder, or one that reknow wrote, since its contents are replaced; "
                f"{folder} holds something else, {name}: choose another name"
            )


def growing_folder(
    path: Path,
    command: str,
    *,
    own: Sequence[str],
    written: Sequence[str],
    sources: Iterable[str | Path | None] = (),
) -> Path:
    """The path of a folder that a command writes into and takes up again, with `~` resolved.

    Args:
        own: what shows that the command has been there before, as patterns.
        written: what it writes, as patterns.

    Raises:
        InputError: no folder can be there, it is one of `sources`, or it holds files of these names from elsewhere.
    """
    path = _check_name(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"expected a folder; {path} is none: choose another name")
    for source in _real_paths(sources):
        if path.resolve() == source:
            raise InputError(f"expected a folder of its own; {path} is read from: choose another name")
    if not any(True for pattern in own for _ in path.glob(pattern)):
        for file in (file for pattern in written for file in sorted(path.glob(pattern))):
            raise InputError(
                f"expected a new folder, or one that `reknow {command}` wrote; {path} holds {file.name} from "
                "elsewhere, which would be lost: choose another name"
            )
    return path


def stack_folder(path: str | Path) -> Path:
    """The path of a folder for a stack, with `~` resolved.

    Raises:
        InputError: no folder can be there, or there is one that is no stack and holds other things than patches.
    """
    path = _check_name(Path(path))
    if path.exists() and not path.is_dir():
        raise InputError(f"expected a folder for the stack; {path} is none: choose another name")
    if path.exists() and not (path / STACK_FILE).exists():
        for entry in sorted(path.iterdir()):
            if not entry.name.startswith(".") and entry.suffix != ".patch":  # as a kill may leave them
                raise InputError(
                    f"expected a new folder for the stack, or a stack; {path} holds something else, {entry.name}: "
                    "choose another name"
                )
    return path


def marked_files(folder: Path) -> set[str]:
    """The files that an export wrote into the folder; none where no export did."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return {MARK, *map(str, mark["files"])} if mark["written_by"] == "reknow export" else set()
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def mark_folder(folder: Path, command: str) -> Path:
    """Makes the folder, and notes in it which command writes there, unless something is noted already."""
    if not (folder / MARK).exists():
        write_text(folder / MARK, strict_json({"written_by": f"reknow {command}"}))
    return folder


def _check_free(path: Path, force: bool, sources: Iterable[str | Path | None]) -> Path:
    path = _check_name(path)
    if path.exists() and not force:
        raise InputError(f"expected a new name; {path} exists: choose another, or give --force")
    place = path.resolve()
    for source in _real_paths(sources):
        if place in (source, *source.parents) or (place.exists() and source in place.parents):
            raise InputError(
                f"expected a place apart from what is read; {path} belongs to {source}: choose another name"
            )
    return path


def _check_name(path: Path) -> Path:
    """The path with `~` resolved; raises InputError where nothing can be written under that name."""
    if str(path).startswith(HUB):
        raise InputError(
            f"expected a place on this machine to write to; got {path}: `reknow pull` it, and push what comes of it"
        )
    try:
        named = Path(path).expanduser()
        with suppress(FileNotFoundError):
            os.stat(named)  # which refuses more names than `exists` does
        if not named.exists():
            above = next(parent for parent in named.absolute().parents if parent.exists())
            if not os.access(above, os.W_OK):
                raise PermissionError(13, f"{above} may not be written to")
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"expected a name to write to; got {path} ({reason}): choose another") from error
    return named


def _real_paths(sources: Iterable[str | Path | None]) -> Iterable[Path]:
    """The real paths of those that are files or folders, and of the base models of stack folders among them."""
    for source in sources:
        if source is not None and os.path.exists(source):
            yield Path(source).resolve()
            with suppress(OSError, ValueError, LookupError, TypeError):
                base = json.loads(Path(source, STACK_FILE).read_text(encoding="utf-8"))["base"]
                if os.path.exists(base):
                    yield Path(base).resolve()
