"""`reknow study`: the studies of InstructEdit, each one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reknow.cli.terminal import DEMO, Device, Dtype, Model, open_lm, say, say_table
from reknow.errors import InputError

GRADIENTS = "Do the edit gradients of the tasks lie apart? t-SNE and principal components."
FULL: dict[str, Any] = {"steps": 500, "rank": 1920, "test": 100, "seeds": (0, 1, 2)}


def study(
    name: Annotated[str | None, typer.Argument(help="A study; without one they are listed.")] = None,
    model: Model = DEMO,
    families: Annotated[
        Path | None, typer.Option("--families", help="File of task families; else the bundled one.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Updates for each task of an editor.")] = None,
    test: Annotated[int | None, typer.Option("--test", min=2, help="Cases of each task to read.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Numbers, with commas between. [0]")] = None,
    full: Annotated[bool, typer.Option("--full", help="500 updates a task, 100 cases, three seeds.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="The folder; studies share its editors.")] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Run a study of InstructEdit: train its editors, read them on all tasks. A killed study goes on.

    reknow study tasks          reknow study gradients
    """
    from reknow.instructions.domains import QUESTION, domain_study
    from reknow.instructions.gradients import gradient_study
    from reknow.instructions.studies import STUDIES, Size, run_study

    if name is None:
        rows = [*([key, each.question] for key, each in STUDIES.items()), ["domains", QUESTION]]
        rows += [["gradients", GRADIENTS]]
        return say_table(["study", "question"], rows)
    try:
        numbers = None if seeds is None else tuple(int(part) for part in seeds.split(","))
    except ValueError:
        raise InputError(f"expected --seeds as whole numbers with commas; got {seeds!r}: correct it") from None
    given = {"steps": steps, "test": test, "seeds": numbers}
    size = Size(**{**(FULL if full else {}), **{key: value for key, value in given.items() if value is not None}})
    lm = open_lm(model, dtype, device)
    out = out or Path("runs") / "instructedit"
    chosen = None if families is None else str(families)
    if name == "gradients":
        return say(*gradient_study(lm, out, size, families=chosen, say=say))
    if name == "domains":
        text = domain_study(lm, out, size, say=say)
    else:
        text = run_study(lm, name, out, size, families=chosen, say=say)
    say(text, f"wrote {out / name}.md, .csv and .json")
