"""Tries to make the edits of a run: patches of those that can be made, and what each edit cost."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from pydantic import RootModel

from reknow.contract import Method
from reknow.edits import Edit
from reknow.errors import SINGLE_EDIT_ERRORS, EditFailed, InputError, ReknowError, TextRefused
from reknow.files.atomic import write_json
from reknow.files.schema import Count, FormatError, Strict, explain, read_json
from reknow.lm import LM
from reknow.patching.patches import Patch

_T = TypeVar("_T")


class Cost(Strict):
    """What an edit cost. A file has the fields that were measured, and `error` always."""

    open: ClassVar[bool] = True

    seconds: float | None = None
    peak_memory_mb: float | None = None
    together: Count = 1
    """Edits that were made together, whose mean the cost is."""
    error: str | None
    """Why the edit could not be made; None: it was."""
    stored_kb: float | None = None
    """What a patch stores for an edit, in 1000 bytes: the mean over the edits that it makes."""
    steps: float | None = None
    loss: float | None = None
    repetitions: float | None = None

    def to_json(self) -> dict:
        """The fields that a file has."""
        return self.model_dump(exclude_unset=True)


class _Costs(RootModel[list[Cost] | Cost]):
    """What each edit cost; earlier versions wrote one for all of them."""


class Attempt(NamedTuple):
    """What became of some edits."""

    patch: Patch | None
    """Makes those that could be made; None where there are none."""
    costs: list[Cost]
    """What each edit cost."""


def case_cost(costs: Sequence[Cost]) -> Cost:
    """What a case cost, by its edits, all of which have to be made."""
    return costs[0].model_copy(update={"error": next((c.error for c in costs if c.error is not None), None)})


def attempt(lm: LM, method: Method, edits: list[Edit], file: Path | None = None) -> Attempt:
    """One patch of all edits but for those that cannot be made. Kept under `file`; a patch that an earlier run kept
    is loaded instead."""
    if file is None:
        return _attempt(lm, method, edits)
    note = file.with_suffix(".json")
    if note.exists():  # written last: the patch is whole
        try:
            return _kept_attempt(method, edits, file, note)
        except ReknowError as error:
            warnings.warn(f"{error}; the edits are made again", stacklevel=2)
    made = _attempt(lm, method, edits)
    if made.patch is not None:
        made.patch.save(file)
    write_json(note, [cost.to_json() for cost in made.costs])
    return made


def attempt_each(lm: LM, method: Method, groups: Sequence[Sequence[Edit]]) -> list[Attempt]:
    """A patch of each group by itself; of single edits that are computed together the cost is their mean."""
    if len(groups) > 1 and all(len(group) == 1 for group in groups):
        edits = [edit for (edit,) in groups]
        patches, costs = _measure(lm, edits, lambda makeable: method.edit_each(lm, makeable))
        if patches is not None:  # else what broke down for all of them may do for some of them by themselves
            made = iter(patches)
            patch_of = [next(made) if cost.error is None else None for cost in costs]
            return [Attempt(patch, _with_notes([cost], patch)) for patch, cost in zip(patch_of, costs, strict=True)]
    return [_attempt(lm, method, list(group)) for group in groups]


def _attempt(lm: LM, method: Method, edits: list[Edit]) -> Attempt:
    patch, costs = _measure(lm, edits, lambda makeable: method.edit(lm, makeable))
    return Attempt(patch, _with_notes(costs, patch))


def _kept_attempt(method: Method, edits: list[Edit], file: Path, note: Path) -> Attempt:
    """What an earlier run kept; raises InputError or PatchError where it is damaged, or of other edits."""
    costs = _read_costs(note, len(edits))
    made = tuple(edit for edit, cost in zip(edits, costs, strict=True) if cost.error is None)
    patch = Patch.load(file) if made else None
    if patch is not None and (patch.method, patch.edits) != (method.name, made):
        raise InputError(f"expected these edits by {method.name} in {file}; got {patch.label}")
    return Attempt(patch, costs)


def _read_costs(note: Path, edits: int) -> list[Cost]:
    """The costs of so many edits; raises InputError where the file has something else."""

    def refusal(error: Exception) -> InputError:
        return InputError(f"expected the costs of {edits} edits in {note}; {explain(error)}: delete the file")

    found = read_json(note, _Costs, refusal).root
    costs = found if isinstance(found, list) else [found] * edits
    if len(costs) != edits:
        raise refusal(FormatError(f"it has those of {len(costs)}"))
    return costs


def _measure(lm: LM, edits: list[Edit], run: Callable[[list[Edit]], _T]) -> tuple[_T | None, list[Cost]]:
    """What `run` gives for the edits that can be made, None where there are none; and what every edit cost.

    An edit that is refused, or breaks down by itself, does not cost the others their patch.
    """
    reasons: dict[int, str] = {}
    found: _T | None = None
    cost: dict[str, Any] = {}
    while left := [i for i in range(len(edits)) if i not in reasons]:
        gpus = {p.device for p in lm.model.parameters() if p.device.type == "cuda"}
        peak = _peak_memory(gpus)
        started = time.perf_counter()
        makeable = [edits[i] for i in left]
        failure = None
        try:
            found = run(makeable)
        except SINGLE_EDIT_ERRORS as error:
            failure = error
        except Exception as error:
            if _concerns_all(error):
                raise
            failure = EditFailed(_unforeseen(error))
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        seconds = (time.perf_counter() - started) / len(left)
        cost = {"seconds": round(seconds, 4), "peak_memory_mb": peak(), "together": len(left)}
        if failure is None:
            break
        reasons |= {left[i]: str(failure) for i in _failed_indices(failure, makeable)}
    return found, [Cost(**cost, error=reasons.get(i)) for i in range(len(edits))]


def _concerns_all(error: Exception) -> bool:
    """Whether an error that is no edit's own would come again: what the library refuses, disks, memory, devices."""
    words = str(error).lower()
    given_out = any(sign in words for sign in ("cuda", "hip error", "out of memory", "allocate memory"))
    return given_out or isinstance(error, ReknowError | OSError | MemoryError | ImportError)


def _unforeseen(error: Exception) -> str:
    """The sentence for an error that no method raises on purpose."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        f"expected an edit, or a refusal; got {what[:300]} ({Path(last.filename).name}:{last.lineno}): report it, or "
        "leave the case out"
    )


def _failed_indices(failure: ReknowError, edits: list[Edit]) -> list[int]:
    """Which edits it was: the one that is named, the longest where a text is too long for the model, else all."""
    named = getattr(failure, "edit", None)
    if isinstance(failure, TextRefused):
        named = max(edits, key=lambda edit: len(edit.text) + len(edit.target_new))
    return [i for i, edit in enumerate(edits) if edit == named][:1] or list(range(len(edits)))


def _with_notes(costs: list[Cost], patch: Patch | None) -> list[Cost]:
    """The costs with what the patch stores for each edit, and what the method noted about a single descent: steps,
    last loss, repetitions where it samples."""
    if patch is None:
        return costs
    noted: dict[str, Any] = {"stored_kb": round(patch.stored_bytes / 1000 / max(1, len(patch.edits)), 3)}
    losses, repetitions = patch.notes.get("losses"), patch.notes.get("repetitions")
    if losses and all(isinstance(loss, float) for loss in losses):
        noted |= {"steps": len(losses), "loss": losses[-1]}
        if repetitions is not None:
            noted["repetitions"] = sum(repetitions)
    return [cost.model_copy(update=noted) if cost.error is None else cost for cost in costs]


def _peak_memory(gpus: Collection[torch.device]) -> Callable[[], float | None]:
    """Starts to watch; the function returned gives the peak since then in MB, model included: of the GPUs' memory,
    each with its own peak, or of the process's. None where the system does not say."""
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    if gpus:
        return lambda: round(sum(map(torch.cuda.max_memory_allocated, gpus)) / 2**20, 1)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    except OSError:
        return lambda: None
    return lambda: round(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024, 1)
