"""`reknow demo`, the main job: edit real facts, measure, report, take the edits back and prove it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.options import DEMO, Model, Opening
from reknow.cli.places import run_folder, run_place
from reknow.cli.terminal import say, say_table
from reknow.errors import EditFailed
from reknow.files.locks import write_lock
from reknow.progress import progress

if TYPE_CHECKING:
    from reknow.edits import Case
    from reknow.lm import LM
    from reknow.patching.patches import Patch

_CANDIDATES = 300
"""How many records are asked to find facts that the model knows."""
_FLUENT = 4
"""In how many cases text is sampled for fluency: most of the time would go there."""
_LARGE = 50_000_000
"""Parameters from which on an edit takes seconds where it takes tenths in the bundled models."""
_SHOWN = ("teacher_forced_exact", "contrast", "edit")
"""Which of the result's tables are printed; the report has all."""


@dataclass(frozen=True)
class _Size:
    """How much of it is shown."""

    shown: int
    """How many edits are shown one by one."""
    cases: int
    """In how many cases the methods are compared."""
    methods: tuple[str, ...]
    fluency: bool = False


_TWO = ("rome", "ft-m")
_SIZES = {
    # (large, quick)
    (False, False): _Size(4, 20, ("rome", "r-rome", "ft-l", "ft-m"), fluency=True),
    (False, True): _Size(2, 6, _TWO),
    (True, False): _Size(3, 10, _TWO),
    (True, True): _Size(1, 3, _TWO),
}


def demo(
    model: Model = DEMO,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer facts and methods: seconds, a minute in a real model.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="The run folder; else under runs/.")] = None,
    *,
    opening: Opening,
) -> None:
    """Edit facts in a model, measure and report what changed, take the edits back.

    Real records of CounterFact, offline, in two minutes on two cores; fewer of them in a real model (demo:smollm2).
    """
    from reknow.datasets.cases import load_cases
    from reknow.model.fingerprint import weight_bits
    from reknow.tracing.known import known_cases

    started = time.perf_counter()
    out = run_place(out or run_folder("demo-quick" if quick else "demo", model), "demo", model)[""]
    lm = opening.open(model)
    bits = weight_bits(lm.model)
    numbers = sum(parameter.numel() for parameter in lm.model.parameters())
    size = _SIZES[numbers >= _LARGE, quick]
    candidates = load_cases("counterfact", limit=_CANDIDATES)
    known = known_cases(lm, candidates)
    say(f"{lm.name}: {lm.layers} layers, {numbers:,} parameters")
    say(f"It knows {len(known)} of {len(candidates)} facts of CounterFact. Some of them are changed now.\n")
    cases = (known or candidates)[: size.cases]

    patches = _show(lm, cases[: size.shown])
    with write_lock(out):
        _measure(lm, cases, out, size)
    _take_back(lm, patches, bits)
    say(f"{time.perf_counter() - started:.0f} s in all")


def _show(lm: LM, cases: list[Case]) -> list[Patch]:
    """Edits one fact at a time and prints what the model says before and after; the patches."""
    from reknow.methods import method

    patches = [method("rome").edit(lm, [case.edit]) for case in lm.progress.each("showing edits", cases)]
    for case, patch in zip(cases, patches, strict=True):
        asked = [("the fact", case.edit.text)]
        for kind, name in (("generalization", "in other words"), ("locality", "another fact")):
            asked += [(name, probe.prompt) for probe in case.probes if probe.kind == kind][:1]
        before = _complete(lm, [prompt for _, prompt in asked])
        with lm.patched(patch):
            after = _complete(lm, [prompt for _, prompt in asked])
        rows = [[name, f"{prompt} …", a, b] for (name, prompt), a, b in zip(asked, before, after, strict=True)]
        title = f"{case.edit.subject}: {case.edit.target_true} → {case.edit.target_new}"
        say_table(["", "prompt", "before", "after"], rows, title)
        say("")
    return patches


def _complete(lm: LM, prompts: list[str]) -> list[str]:
    return [" ".join(text.split()) for text in lm.generate(prompts, 6)]


def _measure(lm: LM, cases: list[Case], out: Path, size: _Size) -> None:
    """Compares methods over the cases, prints the tables and writes the report."""
    from reknow.evaluation import Plan, bench
    from reknow.methods import method
    from reknow.report import write_report

    quiet = [replace(case, probes=[p for p in case.probes if p.kind != "fluency"]) for case in cases[_FLUENT:]]

    chosen = {name: method(name) for name in size.methods}
    plan = Plan(fluency=size.fluency)
    cases = cases[:_FLUENT] + quiet
    results = bench(lm, cases, chosen, out, dataset="counterfact, known facts", plan=plan)
    for table in results.tables():
        if table.protocol in _SHOWN:
            header, *rows = table.lines()
            say_table(header, rows, table.title)
            say("")
    with progress.stage("writing the report"):
        say("[in brackets: 95 % interval over the cases]", f"report with pictures: {write_report(out)}\n")


def _take_back(lm: LM, patches: list[Patch], bits: dict[str, str]) -> None:
    """Applies all patches, reverts them in another order and compares every weight's bits."""
    from reknow.model.fingerprint import weight_bits

    for patch in patches:
        lm.apply(patch)
    changed = [name for name, value in weight_bits(lm.model).items() if value != bits[name]]
    say(f"All {len(patches)} edits together change {', '.join(changed)}.")
    for patch in patches[::2] + patches[1::2]:
        lm.revert(patch)
    left = [name for name, value in weight_bits(lm.model).items() if value != bits[name]]
    if left:
        raise EditFailed(f"expected every weight as before; got other bits in {', '.join(left)}: report this")
    say(f"Taken back one by one: all {len(bits)} tensors have the bits they had before.")
