"""Files and folders that are old or whole, never half written."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from reknow.errors import InputError


def write_aside(path: str | Path, write: Callable[[str], object]) -> Path:
    """Calls `write` with a temporary name in the same folder and renames the result, so a file is old or whole."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        mode = aside.stat().st_mode
        write(str(aside))
        aside.chmod(mode)  # safetensors makes files that only their owner may read
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} could not be written ({reason}); what was there is intact: free space or choose another place"
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Writes a UTF-8 text as in `write_aside`."""
    return write_aside(path, lambda aside: Path(aside).write_text(text, encoding="utf-8"))


def folder_aside(folder: str | Path, write: Callable[[Path], None], overwrite: bool) -> Path:
    """Fills a temporary folder beside and renames it, so that a folder is old or whole: what was there is moved away
    before and deleted behind, or comes back."""
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise InputError(f"expected a new folder; {folder} exists: choose another name or overwrite it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        new, old = aside / "new", aside / "old"
        try:
            new.mkdir()
            write(new)
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
        finally:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{folder} could not be written ({error.strerror or error}); what was there is intact: free space or "
            "choose another place"
        ) from error
    return folder
