"""`reknow study`: the studies of the articles that the library began with, each one command."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reknow.cli.options import DEMO, Families, Model, Opening, refuse_beside, whole_numbers
from reknow.cli.places import run_folder, run_place, study_place, trace_place
from reknow.cli.spreading import Spreading
from reknow.cli.terminal import say, say_table
from reknow.errors import InputError, did_you_mean
from reknow.files.locks import write_lock

if TYPE_CHECKING:
    from reknow.studies.articles import Article

_TRACING = "ROME, Figure 2: which states carry a fact, average over known facts."
_TRACED, _ALL_TRACED = 450, 1209
"""Facts of known_1000 that are asked; a model of 135M parameters knows a quarter of them."""
_GRADIENTS = "Do the edit gradients of tasks and editors lie apart? t-SNE and principal components."
_MINUTES = {"tasks": "16", "unseen": "7", "scaling": "12", "balance": "19", "lengths": "13", "scale": "13"}
_MINUTES |= {"baselines": "25", "domains": "8", "gradients": "18"}
"""Of InstructEdit's studies in bfloat16 without sampled text, each with editors of its own; less behind `tasks`."""
_FULL: dict[str, Any] = {"steps": 500, "rank": 1920, "test": 100, "seeds": (0, 1, 2)}


def study(
    name: Annotated[str | None, typer.Argument(help="A study; without one they are listed.")] = None,
    model: Model = DEMO,
    families: Families = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="InstructEdit: updates for each task of an editor. [100]")
    ] = None,
    test: Annotated[
        int | None, typer.Option("--test", min=2, help="At most so many cases of each task or set.")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", help="InstructEdit: with commas between; domains and gradients take the first. [0]"),
    ] = None,
    fluency: Annotated[
        int | None,
        typer.Option("--fluency", min=0, help="InstructEdit: after so many of them text is sampled; 0: none. [10]"),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="In the full size, for hours; InstructEdit: 500 updates, three seeds.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="The folder; InstructEdit's share their editors.")] = None,
    *,
    opening: Opening,
    spreading: Spreading,
) -> None:
    """Run a study of the articles and write its tables. A killed study goes on.

    reknow study                reknow study mass --model demo:smollm2
    """
    from reknow.studies.articles import ARTICLES, sized

    if name is None:
        asked = {"--families": families, "--steps": steps, "--test": test, "--seeds": seeds, "--fluency": fluency}
        refuse_beside("the list of studies, which no name gives,", asked | {"--full": full or None, "--out": out})
        return say_table(["study", " minutes", "question"], _listed())
    if name not in (names := [row[0] for row in _listed()]):
        raise did_you_mean("study", name, names)
    if name == "tracing" or name in ARTICLES:
        refuse_beside(name, {"--families": families, "--steps": steps, "--seeds": seeds, "--fluency": fluency})
        out = out or run_folder(name, model)
        if name == "tracing":
            return _trace(model, test or (_ALL_TRACED if full else _TRACED), out, opening, spreading)
        return _compare(sized(ARTICLES[name], test, full=full), name, model, out, opening, spreading)
    spreading.refuse(f"{name}, whose editors are trained one after the other")
    if name == "domains" and families is not None:
        raise InputError("expected domains without --families, since its editors read no instructions: leave it out")
    given = {"steps": steps, "test": test, "seeds": whole_numbers("--seeds", seeds), "fluency": fluency}
    budget = {**(_FULL if full else {}), **{key: value for key, value in given.items() if value is not None}}
    out = study_place(out or run_folder("instructedit", model), name, model)
    _train(name, model, budget, None if families is None else str(families), out, opening)


def _listed() -> list[list[str]]:
    """Name, minutes on two idle cores with SmolLM2 and question of every study."""
    from reknow.studies.articles import ARTICLES
    from reknow.studies.instructedit.domains import QUESTION
    from reknow.studies.instructedit.editors import STUDIES

    rows = [["tracing", "45", _TRACING], *([key, str(one.minutes), one.question] for key, one in ARTICLES.items())]
    asked = {key: one.question for key, one in STUDIES.items()} | {"domains": QUESTION, "gradients": _GRADIENTS}
    return rows + [[key, _MINUTES[key], f"InstructEdit: {question}"] for key, question in asked.items()]


def _trace(model: str, limit: int, out: Path, opening: Opening, spreading: Spreading) -> None:
    """Average indirect effects over the known ones of so many facts of known_1000."""
    from reknow.cli.tracing import spread_traces
    from reknow.tracing.causal import Tracing

    out = trace_place(out, model, force=False)
    spread_traces(spreading, opening, model, "known_1000", limit, Tracing(tokens="classes"), out)


def _compare(study: Article, name: str, model: str, out: Path, opening: Opening, spreading: Spreading) -> None:
    """Runs every part of a study that compares methods, and writes its page."""
    from reknow.cli.comparing import compare_methods, ready_methods, say_failed, say_share
    from reknow.cli.measuring import methods_by_label
    from reknow.cli.reporting import write_run
    from reknow.studies.comparison import load_sets
    from reknow.studies.ice.convergence import measure_convergence
    from reknow.studies.ice.presets import CONVERGENCE, ICE_PRESETS

    run_place(out, "study", model)
    if name == CONVERGENCE:
        spreading.refuse(name)
    runs = []
    with spreading.engine(partial(opening.open, model), opening.device) as engine:
        for part, preset in study.parts.items():
            cases, plan = preset.size
            loaded = load_sets(cases, one_patch=plan.mode == "batch" or plan.batch_size > 1)
            chosen = ready_methods(engine, methods_by_label(preset.methods, []))
            if name == CONVERGENCE:
                edits = [case.edit for cases_of in loaded.sets.values() for case in cases_of]
                engine.ask(partial(measure_convergence, edits=edits, methods=chosen, out=out))
                continue
            folders = run_place(out / part, "study", model, loaded.sets)
            if study.grows:
                say(f"== {part}")
            shard, script = spreading.shard, name in ICE_PRESETS
            runs += compare_methods(engine, loaded, chosen, plan, folders, shard, script_ppl_r=script)
    if spreading.shard is not None:
        return say_share(spreading.shard, out, runs)
    write_run(out)
    say_failed(runs)


def _train(name: str, model: str, budget: dict[str, Any], families: str | None, out: Path, opening: Opening) -> None:
    """Trains the editors of a study of InstructEdit, and reads them."""
    from reknow.studies.instructedit.domains import domain_study
    from reknow.studies.instructedit.editors import Budget, run_study
    from reknow.studies.instructedit.gradients import gradient_study

    given = Budget(**budget)
    lm = opening.open(model)
    with write_lock(out):
        if name == "gradients":
            return say(*gradient_study(lm, out, given, families=families, on_progress=say))
        if name == "domains":
            text = domain_study(lm, out, given, on_progress=say)
        else:
            text = run_study(lm, name, out, given, families=families, on_progress=say)
    say(text, f"wrote {out / name}.md, .csv and .json")
