"""What edits do to other abilities: tasks of lm-evaluation-harness before and after, in rows of their own.

They are measured when a run has its patches: on the unedited model, at the checkpoints of a sequence and behind all
its edits. Single edits, each on the unedited model, would ask all items once per case.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote

from pydantic import Field

from reknow.errors import InputError
from reknow.evaluation.differences import read_and_close
from reknow.evaluation.harness import run_tasks
from reknow.evaluation.intervals import Mean, average_cases
from reknow.evaluation.run_folder import RunManifest, run_digest
from reknow.evaluation.stages import BEFORE, END, UNEDITED, checkpoint, stage_order
from reknow.files.json_lines import Rows
from reknow.files.locks import write_lock
from reknow.files.manifest import read_manifest
from reknow.files.schema import Listed, Strict
from reknow.lm import LM
from reknow.model.exclusive import typed_exclusively
from reknow.patching.patches import Patch

__all__ = [
    "ABILITY_FILE",
    "average_abilities",
    "measure_abilities",
    "measure_given",
    "read_abilities",
    "refuse_single",
]

ABILITY_FILE = "ability.jsonl"
_KEY = ("method", "seed", "stage", "asked", "task")


class _AbilityRow(Strict):
    """A line of `ability.jsonl`: one task on one model."""

    method: str
    seed: int
    stage: str
    asked: str
    """The name that was given, of the task or of a group of tasks."""
    task: str
    metric: str
    values: Annotated[Listed[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]
    """Of each item."""
    run: str = ""


class _Place(NamedTuple):
    """A model that is measured: which patches are on it, and where that stands in a run."""

    method: str
    seed: int
    stage: str
    patches: tuple[Patch, ...]


def refuse_single(mode: str, cases: int, names: Sequence[str]) -> None:
    """Raises InputError for single edits, with what it would cost."""
    if mode == "single":
        raise InputError(
            f"expected abilities of edits that hold together; got single edits, of which each would cost a pass over "
            f"all items of {', '.join(names)}, {cases} times for each method: add --mode batch or sequential"
        )


@typed_exclusively
def measure_abilities(lm: LM, folder: str | Path, names: Sequence[str]) -> None:
    """Measures what a run folder of `bench` lacks; what is there already is not measured again.

    Args:
        lm: the unedited model of the run.
        names: tasks, see `run_tasks`.

    Raises:
        InputError: a run of single edits or of another model, or a task cannot be run.
        MissingExtra: lm-evaluation-harness is not installed.
    """
    folder = Path(folder)
    settings = read_manifest(folder, RunManifest)["settings"]
    refuse_single(settings["mode"], settings["cases"], names)
    if settings["model"] != lm.fingerprint.digest:
        raise InputError(f"expected the model of {folder}; {lm.name} is another: open that one")
    with write_lock(folder / ABILITY_FILE):
        rows = _open(folder, settings)
        for place in _places(folder, settings):
            left = [name for name in names if not _is_done(rows, place, name)]
            if left:
                with lm.stacked((*lm.patches, *place.patches)):
                    _measure(lm, rows, place, left)


def measure_given(
    open_edited: Callable[[], LM], open_base: Callable[[], LM], folder: Path, names: Sequence[str], label: str
) -> None:
    """The same for a folder of `score`: its base, and the model that somebody else edited, one after the other."""
    settings = read_manifest(folder, RunManifest)["settings"]
    before, after = _Place(UNEDITED, 0, BEFORE, ()), _Place(label, settings["seeds"][0], END, ())
    with write_lock(folder / ABILITY_FILE):
        rows = _open(folder, settings)
        for place, open_model in ((before, open_base), (after, open_edited)):
            if left := [name for name in names if not _is_done(rows, place, name)]:
                read_and_close(open_model, lambda lm, place=place, left=left: _measure(lm, rows, place, left))


def _open(folder: Path, settings: Mapping[str, Any]) -> Rows:
    return Rows(folder / ABILITY_FILE, _KEY, _AbilityRow, run=run_digest(settings))


def _is_done(rows: Rows, place: _Place, name: str) -> bool:
    return any(key[:4] == (place.method, place.seed, place.stage, name) for key in rows)


def _measure(lm: LM, rows: Rows, place: _Place, names: Sequence[str]) -> None:
    for name in names:
        for found in run_tasks(lm, [name]):
            about = {"method": place.method, "seed": place.seed, "stage": place.stage, "asked": name}
            rows.add({**about, "task": found.task, "metric": found.metric, "values": list(found.values)})


def _places(folder: Path, settings: Mapping[str, Any]) -> Iterator[_Place]:
    """The models of a run whose edits hold together, as its folder has their patches."""
    yield _Place(UNEDITED, 0, BEFORE, ())
    cases = settings["cases"]
    size = cases if settings["mode"] == "batch" else settings["batch_size"]
    for label in settings["methods"]:
        for seed in settings["seeds"]:
            kept = folder / "patches" / f"{quote(label, safe='')}-{seed}"
            patches: tuple[Patch, ...] = ()
            for start in range(0, cases, size):
                if not (kept / f"{start:06d}.json").exists():  # written last, and where no edit could be made too
                    warnings.warn(
                        f"expected the patches of {label} in {kept}; those from edit {start + 1} on are missing, so "
                        "abilities behind them are not measured",
                        stacklevel=3,
                    )
                    break
                if (file := kept / f"{start:06d}.patch").exists():
                    patches = (*patches, Patch.load(file))
                made = min(start + size, cases)
                if made == cases or made in settings["checkpoints"]:
                    yield _Place(label, seed, END if made == cases else checkpoint(made), patches)


def read_abilities(folder: Path, settings: Mapping[str, Any]) -> dict[tuple, dict]:
    """The rows of a run folder, of the unedited model and of its methods; empty where none was measured."""
    rows = Rows.reading(folder / ABILITY_FILE, _KEY, _AbilityRow, run=run_digest(settings))
    own = {UNEDITED, *settings["methods"]}
    return {key: row for key, row in rows.items() if row["method"] in own}


def average_abilities(rows: Mapping[tuple, Mapping]) -> dict[tuple[str, str, str], Mean]:
    """(method, stage, task) → share of its items with the interval over them; several seeds are averaged first."""
    found: dict[tuple[str, str, str], list[Sequence[float]]] = {}
    for row in sorted(rows.values(), key=lambda row: stage_order(row["stage"])):
        found.setdefault((row["method"], row["stage"], row["task"]), []).append(row["values"])
    means = {}
    for place, values in found.items():
        items = [sum(own) / len(own) for own in zip(*values, strict=False)]
        means[place] = average_cases([{"right": item} for item in items])["right"]
    return means
