"""Results of runs that nobody made: what pages show of them is known beforehand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reknow.evaluation.results import Results
from reknow.evaluation.run_folder import run_digest


def reading(kind: str, right: bool, answer: str = "Rome", **fields: Any) -> dict:
    """A question that was answered right, or with Oslo; its answer has a probability of e^-0.1, or of e^-3."""
    return {
        "kind": kind, "name": kind, "prompt": "It is in", "answers": [answer], "hits": [int(right)],
        "top": [1 if right else 2], "nll": 0.1 if right else 3.0, "nll_new": None, "nll_true": None,
        "text": answer if right else "Oslo", "divergence": None, "ppl_r": None,
    } | fields  # fmt: skip


def make_results(
    methods: dict[str, tuple[Sequence, Sequence]],
    *,
    together: int = 1,
    prompt: str = "{} is in",
    subject: str = "It {}",
    target: str = "Rome",
    failed: Sequence[tuple[str, int]] = (),
    name: str = "set",
    **settings: Any,
) -> Results:
    """Method → of each case, is the new answer there, is the neighbour kept.

    Args:
        prompt, subject, target: of each case; `{}` of the subject is its number.
        failed: (method, number of the case) of edits that could not be made.
    """
    before, rows = {}, {}
    for method, (new, kept) in methods.items():
        for number, (is_new, is_kept) in enumerate(zip(new, kept, strict=True)):
            case, about = f"{name}/{number}", subject.replace("{}", str(number))
            edit = {"prompt": prompt, "subject": about, "target_new": target, "target_true": "Oslo"}
            asked = {"prompt": prompt.replace("{}", about)}
            then = [reading("reliability", False, target, **asked), reading("locality", True, "Lima")]
            before[case,] = {"case": case, "edit": edit, "held_out_perplexity": 20.0, "readings": then}
            broken = (method, number) in failed
            rows[method, 0, "single", "after_edit", case] = {
                "case": case, "method": method, "seed": 0, "mode": "single", "stage": "after_edit",
                "seconds": 0.5, "peak_memory_mb": 100.0, "together": together, "stored_kb": 4.0,
                "error": "expected a layer; got none" if broken else None, "held_out_perplexity": 21.0,
                "readings": [reading("reliability", is_new, target, **asked), reading("locality", is_kept, "Lima")],
            }  # fmt: skip
    about = {
        "model": "m", "reknow": "0", "patches": [], "dataset": name, "cases": len(before), "cases_digest": "d",
        "methods": {label: {"name": label} for label in methods}, "mode": "single", "batch_size": 1,
        "checkpoints": [], "seeds": [0],
    } | settings  # fmt: skip
    return Results({"model": "made up", "dtype": "float32", "settings": about}, before, rows)


def write_run(folder: Path, results: Results) -> Path:
    """The run as a folder."""
    folder.mkdir(parents=True)
    manifest = {**results.manifest, "started": "2026-01-02T03:04:05+0000", "machine": {}, "refused": []}
    run = run_digest(manifest["settings"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name, rows in (("before", results.before), ("cases", results.rows)):
        lines = [json.dumps({**row, "run": run}) + "\n" for row in rows.values()]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder
