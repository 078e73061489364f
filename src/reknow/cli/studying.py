"""`reknow study`: the studies of InstructEdit, each one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reknow.cli.options import DEMO, Families, Model, Opening, whole_numbers
from reknow.cli.places import run_folder, study_place
from reknow.cli.terminal import say, say_table
from reknow.errors import InputError, did_you_mean
from reknow.files.locks import write_lock

_GRADIENTS = "Do the edit gradients of the tasks lie apart? t-SNE and principal components."
_FULL: dict[str, Any] = {"steps": 500, "rank": 1920, "test": 100, "seeds": (0, 1, 2)}


def study(
    name: Annotated[str | None, typer.Argument(help="A study; without one they are listed.")] = None,
    model: Model = DEMO,
    families: Families = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Updates for each task of an editor.")] = None,
    test: Annotated[int | None, typer.Option("--test", min=2, help="Cases of each task to read.")] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="With commas between; domains and gradients take the first. [0]")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="500 updates a task, 100 cases, three seeds.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="The folder; studies share its editors.")] = None,
    *,
    opening: Opening,
) -> None:
    """Run a study of InstructEdit: train its editors, read them on all tasks. A killed study goes on.

    reknow study tasks          reknow study gradients
    """
    from reknow.studies.instructedit.domains import QUESTION, domain_study
    from reknow.studies.instructedit.editors import STUDIES, Budget, run_study
    from reknow.studies.instructedit.gradients import gradient_study

    questions = {key: each.question for key, each in STUDIES.items()}
    questions |= {"domains": QUESTION, "gradients": _GRADIENTS}
    if name is None:
        return say_table(["study", "question"], [list(row) for row in questions.items()])
    if name not in questions:
        raise did_you_mean("study", name, questions)
    if name == "domains" and families is not None:
        raise InputError("expected domains without --families, since its editors read no instructions: leave it out")
    given = {"steps": steps, "test": test, "seeds": whole_numbers("--seeds", seeds)}
    budget = Budget(
        **{**(_FULL if full else {}), **{key: value for key, value in given.items() if value is not None}}
    )
    out = study_place(out or run_folder("instructedit", model), name, model)
    lm = opening.open(model)
    chosen = None if families is None else str(families)
    with write_lock(out):
        if name == "gradients":
            return say(*gradient_study(lm, out, budget, families=chosen, on_progress=say))
        if name == "domains":
            text = domain_study(lm, out, budget, on_progress=say)
        else:
            text = run_study(lm, name, out, budget, families=chosen, on_progress=say)
    say(text, f"wrote {out / name}.md, .csv and .json")
