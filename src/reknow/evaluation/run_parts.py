"""The rows of a run folder, whole or in parts: who may write where, what is missing, and what is no row.

A run has `before.jsonl` and `cases.jsonl`. Each of N commands that share it has files of its own beside them, such as
`cases.2-of-4.jsonl`, and reads those of the others. So the folder may lie on a file system that machines share, or be
put together from copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from reknow.engine.shards import PATIENCE, Shard, part_files, share_lock
from reknow.evaluation.run_folder import (
    BEFORE_FILE,
    BEFORE_KEY,
    ROW_KEY,
    ROWS_FILE,
    BeforeRow,
    CaseRow,
    RunManifest,
    run_digest,
    run_tasks,
)
from reknow.files.json_lines import Rows, set_aside
from reknow.files.locks import write_lock
from reknow.files.manifest import open_manifest, read_manifest

__all__ = ["OpenRun", "open_run", "read_rows", "repair", "say_missing"]

_FILES = ((BEFORE_FILE, BEFORE_KEY, BeforeRow), (ROWS_FILE, ROW_KEY, CaseRow))
_REMEDY = "`reknow report {} --repair` sets it aside, and the run makes the row again"


class OpenRun(NamedTuple):
    """A run folder that this process may write to."""

    manifest: dict[str, Any]
    before: Rows
    rows: Rows

    def __contains__(self, key: object) -> bool:
        """Whether there is a row of that key, of the unedited model or of the others."""
        return key in self.before or key in self.rows

    def add(self, row: dict) -> None:
        """Keeps a row, of the unedited model or of the others."""
        (self.rows if "method" in row else self.before).add(row)


@contextmanager
def open_run(
    folder: Path, settings: Mapping[str, Any], about: Mapping[str, Any], shard: Shard | None = None
) -> Iterator[OpenRun]:
    """A run folder, opened to write its rows; with a shard those of that part.

    Raises:
        InputError: the folder was started with other settings, another process writes there, or a line is no row.
    """
    with share_lock(folder / ROWS_FILE, shard):
        with write_lock(folder, wait=PATIENCE):
            manifest = open_manifest(folder, settings, about)
        yield _open(folder, manifest, shard)


def _open(folder: Path, manifest: dict[str, Any], shard: Shard | None) -> OpenRun:
    run, opened = run_digest(manifest["settings"]), []
    for file, key, form in _FILES:
        whole = folder / file
        own = shard.file(whole) if shard else whole
        rows = Rows(own, key, form, run=run, remedy=_REMEDY.format(folder))
        _take_others(rows, whole, own)
        opened.append(rows)
    return OpenRun(manifest, *opened)


def read_rows(folder: Path, manifest: Mapping[str, Any]) -> tuple[Rows, Rows]:
    """The rows that a run folder has, of the unedited model and of the others; all parts, which may still grow.

    Raises:
        InputError: a line is no row.
    """
    run, found = run_digest(manifest["settings"]), []
    for file, key, form in _FILES:
        rows = Rows.reading(folder / file, key, form, run=run, remedy=_REMEDY.format(folder))
        _take_others(rows, folder / file, folder / file)
        found.append(rows)
    return found[0], found[1]


def _take_others(rows: Rows, whole: Path, own: Path) -> None:
    """Adds what the other files have to the rows that are there, not to their file."""
    for path in (whole, *part_files(whole).values()):
        if path != own:
            other = Rows.reading(path, rows.names, rows.form, run=rows.run, remedy=rows.remedy)
            for key, row in other.items():
                rows.setdefault(key, row)


def say_missing(
    manifest: Mapping[str, Any], before: Mapping[tuple, dict], rows: Mapping[tuple, dict], folder: Path
) -> str | None:
    """How many rows of the run are not there, by part where it has parts; None: it is whole, or older than that this
    can be said."""
    if (found := run_tasks(manifest)) is None:
        return None
    tasks, plan = found
    sizes = {shard.of for shard in part_files(folder / ROWS_FILE)} | {s.of for s in part_files(folder / BEFORE_FILE)}
    of = sizes.pop() if len(sizes) == 1 else 0
    total, missing = 0, Counter[int]()
    for number, task in enumerate(tasks):
        keys = task.keys(plan)
        total += len(keys)
        missing[number % of + 1 if of else 0] += sum(key not in before and key not in rows for key in keys)
    if not (count := missing.total()):
        return None
    said = f"Not finished: {count} of {total} rows are missing"
    parts = [f"{missing[part]} of part {part} of {of}" for part in sorted(missing) if part and missing[part]]
    return f"{said}, {', '.join(parts)}" if parts else said


def repair(folder: Path) -> list[str]:
    """Sets the lines of a run folder that are no rows aside, each file's into one beside it; says which.

    Raises:
        InputError: the folder is no run, or another process writes there.
    """
    run, said = run_digest(read_manifest(folder, RunManifest)["settings"]), []
    with share_lock(folder / ROWS_FILE, None):
        for file, key, form in _FILES:
            for path in (folder / file, *part_files(folder / file).values()):
                for number, why in set_aside(path, key, form, run=run):
                    said.append(f"{path}: line {number} is no row ({why}); it is in {path.name}.bad")
    return said
