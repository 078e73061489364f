"""Run folders: those that lie below a folder, what each is in a line, and by which names several are compared."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from reknow.errors import InputError
from reknow.evaluation.run_folder import RunManifest
from reknow.files.manifest import read_manifest
from reknow.files.outputs import MANIFEST_FILE

_DEEPEST, _MOST_FOLDERS, _MOST_RUNS = 5, 4000, 200
"""Where a search ends: so many folders below the first, so many looked into, so many runs found."""
_PASSED_OVER = {"node_modules", "site-packages", "__pycache__"}


class Run(NamedTuple):
    """A run folder, as lists show it."""

    path: Path
    """As it was found, from the folder of the search."""
    model: str
    data: str
    methods: list[str]
    cases: int
    date: str
    """The day on which it was started, as 2026-01-31."""

    @property
    def line(self) -> str:
        """All of it in a line."""
        cases = f"{self.cases:,} {'case' if self.cases == 1 else 'cases'}"
        return f"{self.path} · {', '.join(self.methods)} · {cases} of {self.data} · {self.model} · {self.date}"


def find_runs(folder: Path) -> list[Run]:
    """The runs of `bench` below a folder, the newest first; the search goes a few folders deep, links aside."""
    found: list[tuple[str, Run]] = []
    for place in _folders(folder):
        if len(found) == _MOST_RUNS:
            break
        if not (place / MANIFEST_FILE).is_file() or not any(place.glob("*.jsonl")):
            continue
        try:
            manifest = read_manifest(place, RunManifest)
        except InputError:  # of a training, or a run of another kind
            continue
        started = manifest.get("started") or time.strftime(
            "%Y-%m-%dT%H:%M:%S", time.localtime((place / MANIFEST_FILE).stat().st_mtime)
        )
        settings = manifest["settings"]
        run = Run(
            place.relative_to(folder),
            manifest["model"],
            settings["dataset"] or "a list",
            list(settings["methods"]),
            settings["cases"],
            started[:10],
        )
        found.append((started, run))
    return [run for _, run in sorted(found, key=lambda one: one[0], reverse=True)]


def _folders(first: Path) -> Iterator[Path]:
    """The folder and those below it, those that lie less deep first."""
    waiting = deque([(first, 0)])
    for _ in range(_MOST_FOLDERS):
        if not waiting:
            return
        place, depth = waiting.popleft()
        yield place
        if depth == _DEEPEST:
            continue
        try:
            inside = [each.name for each in os.scandir(place) if each.is_dir(follow_symlinks=False)]
        except OSError:  # may not be read, or is gone
            continue
        names = (name for name in sorted(inside) if not name.startswith(".") and name not in _PASSED_OVER)
        waiting.extend((place / name, depth + 1) for name in names)


def parts_of(run: Path) -> list[Path]:
    """The run folders in a folder: itself, or those of a study, one per set."""
    inside = [path.parent for path in sorted(run.glob(f"*/{MANIFEST_FILE}"))]
    return [run] if (run / MANIFEST_FILE).exists() or not inside else inside


def name_runs(runs: Sequence[Path]) -> dict[str, Path]:
    """The folders of runs by the names that they have where they are compared.

    Raises:
        InputError: one is named twice.
    """
    folders = [part for run in runs for part in parts_of(run)]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise InputError(f"expected different runs; got {', '.join(names)}: name each once")
    return dict(zip(names, folders, strict=True))
