"""What the files of a run folder hold, and which of their rows belong to the run that its manifest describes."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, FailFast, Field, JsonValue
from pydantic.dataclasses import dataclass as pydantic_dataclass

from reknow.errors import InputError
from reknow.evaluation.attempts import Cost
from reknow.evaluation.plan import Plan
from reknow.evaluation.readings import Positive, Reading
from reknow.evaluation.stages import IN_CONTEXT, UNEDITED, Mode, Stage, checkpoint_edits
from reknow.evaluation.tasks import Task, list_tasks
from reknow.files.schema import Count, Listed, Strict

BEFORE_FILE, ROWS_FILE = "before.jsonl", "cases.jsonl"
BEFORE_KEY, ROW_KEY = ("case",), ("method", "seed", "mode", "stage", "case")


def _as_bool(number: object) -> bool:
    if number not in (0, 1):
        raise ValueError("expected 0 or 1")
    return bool(number)


@pydantic_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class _StoredReading(Reading):
    """A `Reading` as JSON."""

    hits: Annotated[tuple[Annotated[bool, BeforeValidator(_as_bool)], ...], FailFast()] = Field()
    top: Annotated[tuple[Count, ...], FailFast()] = Field()
    ratios: tuple[Positive, Positive] | None = None
    """As earlier versions have it: `ppl_r`, and the same as the script of its authors reads it."""

    def __post_init__(self):
        if self.kind != "fluency" and not (self.answers and self.hits and self.nll is not None):
            raise ValueError("expected an answer with its hits and its likelihood")
        if len(self.hits) != len(self.top):
            raise ValueError(f"expected as many tokens in top as in hits, {len(self.hits)}; got {len(self.top)}")
        if self.nll_new is not None and self.kind not in ("reliability", "generalization", "locality"):
            raise ValueError(f"expected no contrast of two answers for a probe of {self.kind}")


class _Row(Strict):
    open: ClassVar[bool] = True

    case: str
    held_out_perplexity: Positive | None
    held_out_kl: Annotated[float, Field(ge=0, le=700)] | None = None
    """KL(unedited ‖ now) per token of the held-out texts, in nats."""
    weight_change: Annotated[float, Field(ge=0)] | None = None
    """‖ΔW‖ / ‖W‖, Frobenius: the largest of all matrices that the run has changed; None: it has changed none."""
    readings: Listed[_StoredReading]


class _StoredEdit(Strict):
    """The edit of a case, as far as it is shown."""

    open: ClassVar[bool] = True

    prompt: str
    target_new: str
    subject: str | None = None


class BeforeRow(_Row):
    """A line of `before.jsonl`."""

    edit: _StoredEdit


class CaseRow(_Row, Cost):
    """A line of `cases.jsonl`."""

    method: str
    seed: int
    mode: str
    stage: Stage


class _RunSettings(Strict):
    """What a comparison of methods was started with, as far as the results depend on it."""

    open: ClassVar[bool] = True

    reknow: str
    model: str
    patches: Listed[str]
    dataset: str
    cases: Count
    cases_digest: str
    methods: dict[str, dict[str, JsonValue]]
    mode: Mode
    batch_size: Count
    checkpoints: Listed[Count]
    seeds: Annotated[Listed[int], Field(min_length=1)]


class RunManifest(Strict):
    """`manifest.json` of a comparison of methods."""

    open: ClassVar[bool] = True

    model: str
    dtype: str
    started: str = ""
    machine: dict[str, JsonValue] = Field(default_factory=dict)
    refused: Listed[str] = Field(default_factory=list)
    """Why records of the data set are no cases."""
    names: Listed[str] = Field(default_factory=list)
    """The cases in their order; of earlier versions nobody knows."""
    together: dict[str, Count] = Field(default_factory=dict)
    """Label of each method → how many single edits it computes at a time."""
    oracle: list[str] | None = None
    """The cases that the unedited model is asked with the edit in front; None: all, where any are."""
    settings: _RunSettings


def run_tasks(manifest: Mapping[str, Any]) -> tuple[list[Task], Plan] | None:
    """The tasks of a run in the order in which one process does them, and its plan; None: an earlier version's, which
    does not say."""
    names, together = manifest.get("names"), manifest.get("together", {})
    if not names or not together.keys() >= manifest["settings"]["methods"].keys():
        return None
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in manifest["settings"].items()
    }
    plan = Plan(**{each.name: settings[each.name] for each in fields(Plan) if each.name in settings})
    return list_tasks(names, together, plan, manifest.get("oracle")), plan


def run_digest(settings: Mapping[str, Any]) -> str:
    """Tells the rows of one run from those of others: model, what is applied to it, cases and methods."""
    about = [settings[name] for name in ("model", "patches", "cases_digest", "methods")]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:12]


def own_rows(
    manifest: Mapping[str, Any],
    before: Mapping[tuple, dict],
    rows: Mapping[tuple, dict],
    cases: Iterable[str] | None,
    folder: Path,
) -> tuple[dict[tuple, dict], dict[tuple, dict]]:
    """The rows that the manifest names, of the unedited model and of the others, in the order in which one process
    makes them; warns of those that are left out. What cannot be compared with the unedited model yet is left out too.

    Args:
        cases: names of the run's cases; None: those that the unedited model was asked.

    Raises:
        InputError: the unedited model was asked more cases than the run has.
    """
    settings = manifest["settings"]
    known = {(case,) for case in cases} if cases is not None else before.keys()
    if cases is None and len(before) > settings["cases"]:
        raise InputError(
            f"expected {settings['cases']} cases in {folder}, as its manifest says; got {len(before)} of the "
            f"unedited model: take out the lines of {BEFORE_FILE} that are of other cases"
        )
    asked = {key: row for key, row in before.items() if key in known}
    own, odd, named = {}, Counter({"case": len(before) - len(asked)}), {*manifest.get("names", ())}
    for key, row in rows.items():
        if (why := _odd(row, settings, asked)) is None:
            own[key] = row
        elif why != "case" or row["case"] not in named:  # else another process has still to ask the unedited model
            odd[why] += 1
    if reasons := ", ".join(f"{count} of another {why}" for why, count in odd.items() if count):
        warnings.warn(
            f"{folder} has rows that its manifest does not name, which are left out: {reasons}", stacklevel=3
        )
    if (found := run_tasks(manifest)) is not None:
        tasks, plan = found
        order = {key: place for place, key in enumerate(key for task in tasks for key in task.keys(plan))}
        last = len(order)
        asked, own = ({key: of[key] for key in sorted(of, key=lambda k: order.get(k, last))} for of in (asked, own))
    return asked, own


def _odd(row: Mapping[str, Any], settings: Mapping[str, Any], asked: Mapping[tuple, dict]) -> str | None:
    """What is not the run's own in a row; None: nothing."""
    at, then = checkpoint_edits(row["stage"]), asked.get((row["case"],))
    named = row["method"] in settings["methods"] or (row["method"], row["stage"]) == (UNEDITED, IN_CONTEXT)
    unread = row["error"] is not None and not row["readings"]  # its texts are too long for the model
    own = {
        "method": named,
        "seed": row["seed"] in settings["seeds"],
        "mode": row["mode"] == settings["mode"],
        "stage": at is None or at in settings["checkpoints"],
        "case": then is not None,
        "list of questions": unread or then is None or _questions(then) == _questions(row),
    }
    return next((what for what, fits in own.items() if not fits), None)


def _questions(row: Mapping[str, Any]) -> list[tuple]:
    """What was asked, in order: kind, name, answers, and the first answer's tokens, which locality compares."""
    return [(one["kind"], one["name"], tuple(one["answers"]), len(one["top"])) for one in row["readings"]]
