"""`reknow instruct`: search for instructions that help an editor."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.options import DEMO, Families, Model, Opening, refuse_beside
from reknow.cli.places import INSTRUCTIONS, START, instructions_place, run_folder
from reknow.cli.terminal import say, say_table
from reknow.errors import InputError, did_you_mean
from reknow.files.locks import write_lock

if TYPE_CHECKING:
    from reknow.evaluation.intervals import Mean
    from reknow.instructions import Family, Proposer, Search, SearchResult
    from reknow.instructions.trial import FamilySplit
    from reknow.lm import LM
    from reknow.methods.instructedit import InstructEdit

_TRIAL_STEPS = 40
_CASES = 40


def instruct(
    model: Model = DEMO,
    families: Families = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Names, with commas between; else all.")] = None,
    proposer: Annotated[
        str | None, typer.Option("--proposer", help="A model at a chat server; else the built-in rewriter.")
    ] = None,
    server: Annotated[str | None, typer.Option("--server", help="Its address up to /v1.")] = None,
    editor: Annotated[
        Path | None, typer.Option("--editor", help="A trained editor of instructedit; else one is trained shortly.")
    ] = None,
    trial_steps: Annotated[
        int | None, typer.Option("--trial-steps", min=1, help=f"Updates of that training. [{_TRIAL_STEPS}]")
    ] = None,
    cases: Annotated[int, typer.Option("--cases", min=2, help="Of each task, to try an instruction on.")] = _CASES,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="Of the proposer; else as its server takes it.")
    ] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", min=1, help="Seconds for its answer. [30]")] = None,
    count: Annotated[int | None, typer.Option("--count", help="Instructions to keep of each task. [10]")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=0, help="Rounds at most; 0: score all that are there.")] = 6,
    proposals: Annotated[int | None, typer.Option("--proposals", help="Proposed in a round. [5]")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of rewriter and choices.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="The folder; else under runs/.")] = None,
    *,
    opening: Opening,
) -> None:
    """Search for instructions of each task: propose, try with an editor, hand the scores back.

    The same command takes up a search that was killed. Writes OUT/instructions.json, for --set families=FILE.
    """
    from reknow.files.outputs import mark_folder
    from reknow.instructions import InstructionScorer, load_families, save_families, search
    from reknow.instructions.trial import TRIAL

    if editor is not None:
        refuse_beside("a trained --editor", {"--trial-steps": trial_steps})
    trial_steps = trial_steps or _TRIAL_STEPS
    known = load_families(families)
    chosen = _chosen(known, tasks)
    settings = _search(rounds, seed, {"--proposer": proposer, "--server": server}, count=count, proposals=proposals)
    writer = _writer(proposer, server, temperature, timeout, seed)
    out = instructions_place(out or run_folder("instruct", model), model)
    parts = _split(chosen, cases)
    lm = _opened(opening, model, editor)
    mark_folder(out, "instruct")
    started = time.perf_counter()
    with write_lock(out):
        method = _trial_editor(lm, chosen, parts, families, editor, trial_steps, out)
        trial = InstructionScorer(lm, method, {name: part.trial for name, part in parts.items()})
        about = {"model": lm.fingerprint.digest, "editor": str(editor or f"trained for {trial_steps} steps")}
        about |= {} if cases == TRIAL else {"cases": str(cases)}  # searches before there was a choice had as many
        searched = search(chosen, writer, trial, out, settings, about=about, report=say)
        card = _card(lm, writer, about["editor"], settings, cases) | {"ranks": _ranks(searched)}
        others = [family for family in known.values() if family not in chosen]
        save_families(out / INSTRUCTIONS, [*searched.families, *others], card)
    _say_found(searched, time.perf_counter() - started, trial.edits)
    say(f"wrote {out / INSTRUCTIONS}; use it with: --method instructedit --set families=FILE")


def _writer(
    proposer: str | None, server: str | None, temperature: float | None, timeout: float | None, seed: int
) -> Proposer:
    """The model at a server, or the rewriter without one; raises InputError for what belongs to the former."""
    from reknow.files.llm import LLM
    from reknow.instructions import Rewriter, Writer

    if proposer is not None:
        return Writer(LLM(proposer, server, timeout=timeout or LLM.timeout, temperature=temperature))
    if server is not None:
        raise InputError("expected --proposer with --server; got none: name the model that the server shall use")
    refuse_beside("the built-in rewriter", {"--temperature": temperature, "--timeout": timeout})
    return Rewriter(seed)


def _chosen(known: dict[str, Family], tasks: str | None) -> list[Family]:
    """The task families named; raises InputError where there is none of a name, or one without instructions."""
    wanted = [name.strip() for name in tasks.split(",")] if tasks else list(known)
    for name in wanted:
        if name not in known:
            raise did_you_mean("task", name, known)
        known[name].texts()  # refused here, before anything is trained
    return [known[name] for name in wanted]


def _search(rounds: int, seed: int, writing: dict[str, object], **given: int | None) -> Search:
    """What is given, and of the rest the defaults; raises InputError for what writes instructions without a round."""
    from reknow.instructions import Search

    if rounds == 0:
        asked = writing | {f"--{name}": value for name, value in given.items()}
        refuse_beside("--rounds 0, which proposes nothing,", asked)
    return Search(rounds=rounds, seed=seed, **{name: value for name, value in given.items() if value is not None})


def _opened(opening: Opening, model: str, editor: Path | None) -> LM:
    """The model; raises InputError for an editor that is none for it, before a folder knows of either."""
    from reknow.learning.editors import open_editor

    lm = opening.open(model)
    if editor is not None:
        open_editor("instructedit", str(editor), lm)
    return lm


def _split(chosen: list[Family], cases: int) -> dict[str, FamilySplit]:
    """Each family's cases; raises InputError where one has not as many to try an instruction on."""
    from reknow.instructions.trial import FamilySplit

    parts = {family.name: FamilySplit.of(family, trial=cases) for family in chosen}
    for name, part in parts.items():
        if len(part.trial) < cases:
            raise InputError(
                f"expected {cases} cases of each task to try an instruction on; {name} has {len(part.trial)} behind "
                f"its {len(part.test)} tests: lower --cases, or leave the task out with --tasks"
            )
    return parts


def _trial_editor(
    lm: LM,
    chosen: list[Family],
    parts: dict[str, FamilySplit],
    file: Path | None,
    editor: Path | None,
    steps: int,
    out: Path,
) -> InstructEdit:
    """The editor that is given, or one trained for a minute on the tasks with their first instructions."""
    from reknow.instructions import load_families, save_families
    from reknow.learning.training import Training
    from reknow.methods.instructedit import InstructEdit

    method = InstructEdit(families=None if file is None else str(file), rank=64)
    if editor is not None:
        return replace(method, editor=str(editor))
    first = [replace(family, instructions=family.instructions[:1]) for family in chosen]
    if not (out / START).exists():
        save_families(out / START, first, {"description": "what the trial editor was trained with"})
    elif list(load_families(out / START).values()) != first:
        raise InputError(
            f"expected the tasks and first instructions with which {out} was started; got others: take those in "
            f"{out / START} again, or another folder"
        )
    cases = [case for part in parts.values() for case in part.training]
    short = Training(steps=steps, batch_size=6, validation=0, validate_every=steps, checkpoint_every=steps)
    say(f"training a trial editor: {steps} updates")
    return replace(method, families=str(out / START)).fit(lm, cases, out / "trial", short)


def _ranks(searched: SearchResult) -> str:
    """How many of the instructions that were kept the cases tell from the best."""
    found = [mean for of in searched.behind.values() for mean in of.values()]
    apart = sum(mean.low is not None and mean.low > 0 for mean in found)
    return (
        f"{apart} of {len(found)} instructions are told from the best of their task: the 95 % interval of the "
        "difference on the same cases does not reach 0"
    )


def _card(lm: LM, writer: Proposer, editor: str, settings: Search, cases: int) -> dict[str, object]:
    import reknow
    from reknow.instructions.trial import METRICS

    return {
        "description": "Instructions for InstructEdit, one family per kind of edit; the last of each is unseen.",
        "licence": "Apache-2.0",
        "made by": f"reknow instruct, version {reknow.__version__}",
        "model": f"{lm.name} ({lm.fingerprint.digest})",
        "proposer": writer.name if settings.rounds else "none: the instructions were there",
        "trial editor": f"instructedit, {editor}",
        "scores": f"means over {cases} cases of the trial part of each data set: {', '.join(METRICS.values())}",
        "seed": settings.seed,
    }


def _interval(mean: Mean | None) -> str:
    return "" if mean is None or mean.low is None else f"{mean.low:+.3f} to {mean.high:+.3f}"


def _say_found(searched: SearchResult, seconds: float, edits: int) -> None:
    from reknow.instructions.search import mean

    for family in searched.families:
        behind = searched.behind[family.name]
        rows = [
            ["" if each.seen else "unseen", f"{mean(each.scores):.3f}", _interval(behind.get(each.text)), each.text]
            for each in family.instructions
        ]
        say_table(["", " mean", " behind the best, 95 %", f"{family.name} ({searched.stopped[family.name]})"], rows)
    say(_ranks(searched))
    spent = ", ".join(f"{value:g} {name}" for name, value in searched.cost.items())
    say(f"cost: {seconds:.0f} s, {edits} trial edits; {spent}")
