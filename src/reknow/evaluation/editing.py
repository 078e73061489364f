"""Edits of a run, with what they cost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import torch
from pydantic import RootModel

from reknow.contract import Method
from reknow.edits import Edit
from reknow.errors import SINGLE_EDIT_ERRORS, InputError, ReknowError, TextRefused
from reknow.files.atomic import write_json
from reknow.files.schema import Count, FormatError, Strict, explain, read_json
from reknow.lm import LM
from reknow.patching.patches import Patch

_T = TypeVar("_T")


class EditOutcome(NamedTuple):
    """What became of some edits."""

    patch: Patch | None
    """With those that could be made; None where there are none."""
    costs: list[dict]
    """What each edit cost, and under `error` why it was not made, or None."""


class Cost(Strict):
    """What making a patch took, for each of its edits; as JSON with the ending of the patch replaced."""

    open: ClassVar[bool] = True

    error: str | None
    """Why it could not be made."""
    seconds: float
    peak_memory_mb: float | None
    steps: float | None = None
    loss: float | None = None
    repetitions: float | None = None
    together: Count = 1
    """Edits whose cost this is the mean of."""


class Costs(RootModel[list[Cost] | Cost]):
    """What each edit cost; earlier versions wrote one for all of them."""


def edit_once(lm: LM, method: Method, edits: list[Edit], file: Path | None = None) -> EditOutcome:
    """One patch of all edits but for those that cannot be made. Kept under `file`; a patch that an earlier run kept
    is loaded instead."""
    note = None if file is None else file.with_suffix(".json")
    if file is not None and note is not None and note.exists():  # written last: the patch is whole
        try:
            costs = _read_costs(note, len(edits))
            patch = Patch.load(file) if any(cost["error"] is None for cost in costs) else None
            made = tuple(edit for edit, cost in zip(edits, costs, strict=True) if cost["error"] is None)
            if patch is not None and (patch.method, patch.edits) != (method.name, made):
                raise InputError(f"expected these edits by {method.name} in {file}; got {patch.label}")
            return EditOutcome(patch, costs)
        except ReknowError as error:
            warnings.warn(f"{error}; the edits are made again", stacklevel=2)
    patch, costs = _measure(lm, edits, lambda makeable: method.edit(lm, makeable))
    made = EditOutcome(
        patch, [{**cost, **_descent_notes(patch)} if cost["error"] is None else cost for cost in costs]
    )
    if file is not None and note is not None:
        if patch is not None:
            patch.save(file)
        write_json(note, made.costs)
    return made


def edit_each(lm: LM, method: Method, groups: Sequence[Sequence[Edit]]) -> list[EditOutcome]:
    """A patch of each group by itself; of single edits that are computed together the cost is their mean."""
    if len(groups) > 1 and all(len(group) == 1 for group in groups):
        edits = [edit for (edit,) in groups]
        patches, costs = _measure(lm, edits, lambda makeable: method.edit_each(lm, makeable))
        if patches is not None:  # else what broke down for all of them may do for some of them by themselves
            made = iter(patches)
            patch_of = [next(made) if cost["error"] is None else None for cost in costs]
            return [EditOutcome(p, [{**cost, **_descent_notes(p)}]) for p, cost in zip(patch_of, costs, strict=True)]
    return [edit_once(lm, method, list(group)) for group in groups]


def _read_costs(note: Path, edits: int) -> list[dict]:
    """The costs of so many edits; raises InputError where the file has something else."""

    def refusal(error: Exception) -> InputError:
        return InputError(f"expected the costs of {edits} edits in {note}; {explain(error)}: delete the file")

    found = read_json(note, Costs, refusal).root
    costs = found if isinstance(found, list) else [found] * edits
    if len(costs) != edits:
        raise refusal(FormatError(f"it has those of {len(costs)}"))
    return [cost.model_dump(exclude_unset=True) for cost in costs]


def _measure(lm: LM, edits: list[Edit], run: Callable[[list[Edit]], _T]) -> tuple[_T | None, list[dict]]:
    """What `run` gives for the edits that can be made, None where there are none; and of every edit what it cost and
    why it was not made. An edit that is refused, or breaks down by itself, does not cost the others their patch."""
    reasons: dict[int, str] = {}
    while left := [i for i in range(len(edits)) if i not in reasons]:
        peak = _peak_memory(lm.device)
        started = time.perf_counter()
        makeable = [edits[i] for i in left]
        try:
            found, failure = run(makeable), None
        except SINGLE_EDIT_ERRORS as error:
            found, failure = None, error
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
        seconds = (time.perf_counter() - started) / len(left)
        cost = {"seconds": round(seconds, 4), "peak_memory_mb": peak(), "together": len(left)}
        if failure is None:
            return found, [{**cost, "error": reasons.get(i)} for i in range(len(edits))]
        reasons |= {left[i]: str(failure) for i in _failed_indices(failure, makeable)}
    return None, [{**cost, "error": reasons[i]} for i in range(len(edits))]


def _failed_indices(failure: ReknowError, edits: list[Edit]) -> list[int]:
    """Which edits it was: the one that is named, the longest where a text is too long for the model, else all."""
    named = getattr(failure, "edit", None)
    if isinstance(failure, TextRefused):
        named = max(edits, key=lambda edit: len(edit.text) + len(edit.target_new))
    return [i for i, edit in enumerate(edits) if edit == named][:1] or list(range(len(edits)))


def _descent_notes(patch: Patch | None) -> dict:
    """What the method noted about a single descent: its steps, the last loss, repetitions where it samples."""
    notes = {} if patch is None else patch.notes
    losses, repetitions = notes.get("losses"), notes.get("repetitions")
    if not losses or not all(isinstance(loss, float) for loss in losses):
        return {}
    found = {"steps": len(losses), "loss": losses[-1]}
    return found if repetitions is None else {**found, "repetitions": sum(repetitions)}


def _peak_memory(device: torch.device) -> Callable[[], float | None]:
    """Starts to watch; the function returned gives the peak since then in MB, model included: of the GPU's
    memory, or of the process's. None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    except OSError:
        return lambda: None
    return lambda: round(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024, 1)
