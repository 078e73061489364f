"""Cases and plans of small runs, and their rows as tests compare them."""

from __future__ import annotations

import json

from reknow import Case, Edit, Probe
from reknow.evaluation import Plan, Results

TIMED = ("seconds", "peak_memory_mb")
PLANS = {
    "single": Plan(seeds=(0, 1), fluency=True, held_out=("Peru lives in Lima .",), in_context=("fine",)),
    "batch": Plan("batch", seeds=(0, 1), generate=False),
    "sequential": Plan("sequential", batch_size=2, checkpoints=(2,), fluency=True, fluency_every=1),
}


def make_cases(count: int = 4) -> list[Case]:
    """Cases whose answers end in a full stop, so that what a random model says next does not join their last word."""
    facts = [
        ("Peru", "Paris .", "Lima"),
        ("France", "Apple .", "Paris"),
        ("Apple", "Zoë .", "Peru"),
        ("Zoë", "Lima .", "French"),
    ]
    return [
        Case(
            Edit("The capital of {} is", subject=subject, target_new=new, target_true=true),
            (
                Probe(f"Where is {subject} ? It is in", (new,), "generalization", "paraphrase"),
                Probe("The mother tongue of Danielle is", (true,), "locality", "neighborhood"),
                Probe("Beats Music is owned by", ("Apple", "Apple Inc."), "locality", "other"),
            )
            + (Probe("Peru lives", (), "fluency", "generation"),) * (subject == "Peru"),
        )
        for subject, new, true in facts[:count]
    ]


def all_rows(results: Results) -> list:
    """All rows but for seconds and memory, in the order of the results."""
    rows = [*results.before.values(), *results.rows.values()]
    return json.loads(json.dumps([{k: v for k, v in row.items() if k not in TIMED} for row in rows]))
