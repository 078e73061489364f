"""Edits of a run, with what they cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reknow.edits import Edit
from reknow.errors import EditFailed
from reknow.evaluation.rows import write_json
from reknow.lm import LM
from reknow.patches import Patch


def edit_once(lm: LM, method: Any, edits: list[Edit], file: Path | None) -> tuple[Patch | None, dict]:
    """`_edit`, kept under `file`; a patch that an earlier run kept is loaded instead."""
    if file is None:
        return _edit(lm, method, edits)
    note = file.with_suffix(".json")
    if note.exists():  # written last: the patch is whole
        cost = json.loads(note.read_text(encoding="utf-8"))
        return (None if cost["error"] else Patch.load(file)), cost
    patch, cost = _edit(lm, method, edits)
    if patch is not None:
        patch.save(file)
    write_json(note, cost)
    return patch, cost


def _edit(lm: LM, method: Any, edits: list[Edit]) -> tuple[Patch | None, dict]:
    """The patch, or None where the computation broke down; and what it cost, per edit."""
    patch, error, cost = _measured(lm, lambda: method.edit(lm, edits), len(edits))
    return patch, {**cost, "error": error, **_told(patch)}


def edit_each(lm: LM, method: Any, edits: list[Edit]) -> list[tuple[Patch | None, dict]]:
    """`_edit` of each edit by itself; of edits that are computed together the cost is their mean."""
    if len(edits) > 1:
        patches, error, cost = _measured(lm, lambda: method.edit_each(lm, edits), len(edits))
        if error is None:
            return [(patch, {**cost, "error": None, **_told(patch)}) for patch in patches]
    return [_edit(lm, method, [edit]) for edit in edits]


def _measured(lm: LM, run: Callable[[], Any], edits: int) -> tuple[Any, str | None, dict]:
    """(what it gives, None) or (None, why the computation broke down), and what it cost, per edit."""
    peak = _peak_memory(lm.device)
    started = time.perf_counter()
    try:
        found, error = run(), None
    except EditFailed as failure:
        found, error = None, str(failure)
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    seconds = (time.perf_counter() - started) / edits
    return found, error, {"seconds": round(seconds, 4), "peak_memory_mb": peak()}


def _told(patch: Patch | None) -> dict:
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
