"""Where an export goes, and what it says of the model that it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import reknow
from reknow.errors import InputError
from reknow.files.outputs import marked_files, output_folder
from reknow.lm import LM


def check_place(lm: LM, folder: str | Path, overwrite: bool) -> Path:
    """Where an export goes; raises InputError where it would take the place of anything but an export."""
    if Path(folder).exists() and not overwrite:
        raise InputError(f"expected a new folder; {folder} exists: choose another name or overwrite it")
    return output_folder(Path(folder), True, marked_files, (lm.name, lm.model.name_or_path))


def describe_export(lm: LM) -> dict[str, Any]:
    """What an exported folder says of its model, which other programs pass over."""
    return {
        "version": reknow.__version__,
        "base": lm.name,
        "patches": [{"id": patch.id, "method": patch.method, "edits": len(patch.edits)} for patch in lm.patches],
    }
