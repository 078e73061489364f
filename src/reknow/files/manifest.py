"""The manifest of a run folder: with which settings it was begun, so that no other run goes on in it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from reknow.errors import InputError
from reknow.files.atomic import write_json
from reknow.files.digests import file_digest
from reknow.files.outputs import EDITOR_FILE, MANIFEST_FILE
from reknow.files.schema import Object, Strict, explain, read_json
from reknow.files.strict_json import strict_json
from reknow.registry import as_now
from reknow.texts.writing import clip


def _machine() -> dict[str, Any]:
    """What the run was made on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def open_manifest(
    folder: Path,
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
    former: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """The manifest of a run folder: written where there is none, otherwise compared with the settings wanted now, and
    so are the contents of the files that a method's settings name.

    Args:
        former: the settings that an earlier version wrote, in the form of this one.

    Raises:
        InputError: the folder belongs to a run with other settings, or its manifest is broken.
    """
    path = folder / MANIFEST_FILE
    settings = json.loads(strict_json(settings, default=str))
    now = _flat(settings)
    contents = _contents(now)
    if not path.exists():
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        named = {"contents": contents} if contents else {}
        write_json(path, {**about, "started": started, "machine": _machine(), "settings": settings, **named})
    manifest = read_manifest(folder)
    before = _flat(json.loads(json.dumps(as_now(former(manifest["settings"])), default=str)))
    changes = [
        f"{name} is {clip(repr(now.get(name)), 30)} and was {clip(repr(before.get(name)), 30)}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name)
    ]
    known = manifest.get("contents", {})  # earlier versions have none
    changes += [
        f"{name}, {now[name]}, is a file of other content"
        for name in contents
        if known.get(name, contents[name]) != contents[name]
    ]
    if changes:
        raise InputError(
            f"expected the settings with which {folder} was started; {'; '.join(changes)}: "
            "take these settings again, or another folder"
        )
    return manifest


class _Manifest(Strict):
    """`manifest.json` of a run of any kind."""

    open: ClassVar[bool] = True

    settings: Object


def read_manifest(folder: Path, form: type[Strict] = _Manifest) -> dict[str, Any]:
    """The manifest of a run folder; raises InputError where there is none, or one of another `form`."""

    def refusal(error: Exception) -> InputError:
        return InputError(
            f"expected a run folder with {MANIFEST_FILE}; {folder} has none that can be read ({explain(error)}): "
            "give the folder that `bench` wrote"
        )

    manifest = read_json(folder / MANIFEST_FILE, Object, refusal)
    read_json(folder / MANIFEST_FILE, form, refusal)
    return manifest


def _contents(settings: Mapping[str, Any]) -> dict[str, str]:
    """Setting of a method → the digest of the file that it names, or of the trained editor in a folder that it names.

    Args:
        settings: as `_flat` gives them.
    """
    found = {}
    for name, value in settings.items():
        if isinstance(value, str) and name.partition(".")[0] in ("method", "methods", "editor"):
            for path in (Path(value), Path(value) / EDITOR_FILE):
                if path.is_file():
                    found[name] = file_digest(path)
    return found


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for k, v in value.items() for key, leaf in _flat(v, f"{name}.{k}" if name else k).items()}
