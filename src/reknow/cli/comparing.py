"""Compares methods for `bench` and `study`, and says what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from reknow.cli.failures import SOME_FAILED
from reknow.cli.terminal import say, warn
from reknow.errors import InputError

if TYPE_CHECKING:
    from reknow.contract import Method
    from reknow.engine.jobs import Engine
    from reknow.evaluation import Plan, Results
    from reknow.lm import LM
    from reknow.studies.comparison import LoadedSets


def ready_methods(engine: Engine, chosen: dict[str, Method], *, needed: bool = False) -> dict[str, Method]:
    """The methods as the model decides them; unless all are needed without those that learn to edit and have no
    editor for this model, which is said."""
    ready, reasons = engine.ask(partial(_decide, chosen=chosen, needed=needed))
    for reason in reasons:
        say(f"left out: {reason}")
    return ready


def _decide(lm: LM, chosen: dict[str, Method], needed: bool) -> tuple[dict[str, Method], list[str]]:
    ready, reasons = {label: method.resolve(lm) for label, method in chosen.items()}, []
    for label in [] if needed else chosen:
        try:
            ready[label].seen(lm, [])
        except InputError as error:
            del ready[label]
            reasons.append(str(error))
    return ready, reasons


def say_run(name: str, results: Results, folder: Path, sets: int) -> None:
    """Prints the numbers of one of so many sets."""
    say(*([f"== {name}"] if sets > 1 else []), str(results), "", f"run folder: {folder}")


def compare_methods(
    engine: Engine,
    loaded: LoadedSets,
    methods: dict[str, Method],
    plan: Plan,
    folders: dict[str, Path],
    shard: str | None = None,
    *,
    script_ppl_r: bool,
) -> list[Results]:
    """A run for each set, whose numbers are printed."""
    from reknow.evaluation.runner import bench_on
    from reknow.studies.ice.script_ppl_r import measure_script_ppl_r

    runs = []
    for name, cases in loaded.sets.items():
        about, folder = {"dataset": name, "refused": loaded.refused_of(name)}, folders[name]
        runs.append(bench_on(engine, cases, methods, folder, plan=plan, shard=shard, **about))
        if script_ppl_r and shard is None:
            measure_script_ppl_r(engine, cases, runs[-1], folder)
        say_run(name, runs[-1], folder, len(loaded.sets))
    return runs


def say_share(shard: str, out: Path, runs: Sequence[Results]) -> None:
    """Says that a shard is whole, and how to make the report of all."""
    say(f"part {shard} is whole; when all are: reknow report {out}")
    say_failed(runs)


def say_failed(runs: Sequence[Results]) -> None:
    """Ends the command with status 1 where edits failed."""
    if failed := sum(len(cases) for results in runs for cases in results.failed.values()):
        warn(f"{failed} edits failed, which count as no success; the rest is whole")
        raise typer.Exit(SOME_FAILED)
