"""JSON lines that survive a kill, and the run folder's manifest."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from reknow.edits import Case, to_json
from reknow.errors import InputError
from reknow.files.atomic import append_line, write_text
from reknow.files.schema import FormatError, Object, Strict, explain, parse_json, read_json
from reknow.registry import as_now

BEFORE_FILE, ROWS_FILE, MANIFEST_FILE = "before.jsonl", "cases.jsonl", "manifest.json"
BEFORE_KEY, ROW_KEY = ("case",), ("method", "seed", "mode", "stage", "case")


RUN = "run"
"""Under which name a row in a file says to what run it belongs."""


class AnyRow(Strict):
    """A row of which nothing but its key is known."""

    open: ClassVar[bool] = True


class Rows(dict[tuple, dict]):
    """Rows by key, in the order they came; with a path also appended to that file, each as one whole line.

    Args:
        key: fields that tell a row from the others.
        form: what a line holds.
        run: to what run the rows belong; lines of another one are passed over, and so are not in the way of its own.
    """

    def __init__(self, path: Path | None, key: Sequence[str], form: type[Strict] = AnyRow, *, run: str | None = None):
        super().__init__()
        self.path, self.names, self.form, self.run = path, tuple(key), form, run
        if path is not None and path.exists():
            whole = _whole_lines(path)
            if len(whole) < path.stat().st_size:
                os.truncate(path, len(whole))  # the line that a kill tore
            self._take(whole)

    @classmethod
    def reading(cls, path: Path, key: Sequence[str], form: type[Strict] = AnyRow, *, run: str | None = None) -> Rows:
        """The rows of a file that may still be written to: a torn last line is passed over and left."""
        rows = cls(None, key, form, run=run)
        if path.exists():
            rows.path = path
            rows._take(_whole_lines(path))
        return rows

    def _take(self, whole: bytes) -> None:
        foreign = 0
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                row = parse_json(Object, line, once=True)
                of = row.pop(RUN, self.run)
                if of != self.run and self.run is not None:
                    foreign += 1
                    continue
                parse_json(self.form, line)
                key = tuple(row[name] for name in self.names)
                if not all(isinstance(part, str | int) for part in key):
                    raise FormatError(f"{', '.join(self.names)}: expected texts and numbers")
                self.setdefault(key, row)
            except (FormatError, KeyError) as error:
                raise InputError(
                    f"expected one row as JSON with {', '.join(self.names)}; line {number} of {self.path} has "
                    f"something else ({error}): delete that line, and the run makes it again"
                ) from error
        if foreign:
            warnings.warn(f"{self.path} has {foreign} rows of another run, which are left out", stacklevel=4)

    def add(self, row: dict) -> None:
        """Keeps the row, and writes it down before it returns; a key that is there already stays as it is."""
        key = tuple(row[name] for name in self.names)
        if key in self:
            return
        if self.path is not None:
            line = row if self.run is None else {**row, RUN: self.run}
            append_line(self.path, json.dumps(line, ensure_ascii=False, allow_nan=False))
        self[key] = row


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    write_text(path, text)


def cases_digest(cases: Iterable[Case]) -> str:
    """A hash of everything in the cases, in order."""
    return hashlib.sha256(json.dumps([to_json(case) for case in cases]).encode()).hexdigest()[:16]


def machine() -> dict[str, Any]:
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
    """The manifest of a run folder: written where there is none, otherwise compared with the settings wanted now.

    Args:
        former: the settings that an earlier version wrote, in the form of this one.

    Raises:
        InputError: the folder belongs to a run with other settings, or its manifest is broken.
    """
    path = folder / MANIFEST_FILE
    settings = json.loads(json.dumps(settings, default=str))
    if not path.exists():
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_json(path, {**about, "started": started, "machine": machine(), "settings": settings})
    manifest = read_manifest(folder)
    before, now = _flat(json.loads(json.dumps(as_now(former(manifest["settings"])), default=str))), _flat(settings)
    changes = [
        f"{name} is {now.get(name)!r} and was {before.get(name)!r}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise InputError(
            f"expected the settings with which {folder} was started; {'; '.join(changes)}: "
            "take these settings again, or another folder"
        )
    return manifest


class Manifest(Strict):
    """`manifest.json` of a run of any kind."""

    open: ClassVar[bool] = True

    settings: Object


def read_manifest(folder: Path, form: type[Strict] = Manifest) -> dict[str, Any]:
    """The manifest of a run folder; raises InputError where there is none, or one of another `form`."""

    def refusal(error: Exception) -> InputError:
        return InputError(
            f"expected a run folder with {MANIFEST_FILE}; {folder} has none that can be read ({explain(error)}): "
            "give the folder that `bench` wrote"
        )

    manifest = read_json(folder / MANIFEST_FILE, Object, refusal)
    read_json(folder / MANIFEST_FILE, form, refusal)
    return manifest


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for k, v in value.items() for key, leaf in _flat(v, f"{name}.{k}" if name else k).items()}
