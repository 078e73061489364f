"""`reknow inspect`: what somebody else's edit changed."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.options import Encoding, Json, Opening, check_model
from reknow.cli.terminal import say, say_json, say_table
from reknow.errors import InputError

if TYPE_CHECKING:
    from reknow.evaluation.differences import Difference

_SHOWN = 40
"""How many tensors are shown."""

Edited = Annotated[
    str,
    typer.Argument(help="An edited model: a folder, a GGUF file, a name.", callback=check_model, show_default=False),
]
Base = Annotated[
    str, typer.Option("--base", help="The model that it was made from.", callback=check_model, show_default=False)
]


def inspect(
    model: Edited,
    base: Base,
    subjects: Annotated[
        Path | None,
        typer.Option("--subjects", help="A file of subjects, one a line. [those of CounterFact's sample]"),
    ] = None,
    encoding: Encoding = None,
    *,
    opening: Opening,
    as_json: Json = False,
) -> None:
    """Say which weights of a model differ from its base's, by how much, and whose facts they concern.

    The model may be anybody's: edited by another program, fine-tuned, merged.
    """
    check_two(model, base)
    names = _subjects(subjects, encoding)
    from reknow.evaluation.differences import MOST_RANK, inspect_weights

    found = inspect_weights(partial(opening.open, model), partial(opening.open, base), names)
    if as_json:
        about = {"model": model, "base": base, "tensors": found.tensors, "subjects": len(names)}
        return say_json({**about, "most_rank": MOST_RANK, "differences": [asdict(one) for one in found.differences]})
    count = len(found.differences)
    if not count:
        return say(f"no tensor of {model} differs from {base}: all {found.tensors} have the same numbers")
    say(f"{count} of {found.tensors} tensors differ from {base}")
    _say_tensors(found.differences[:_SHOWN], MOST_RANK)
    if count > _SHOWN:
        say(f"and {count - _SHOWN} more, which differ less: --json has all")
    for one in found.differences:
        _say_subjects(one, len(names))


def check_two(model: str, base: str) -> None:
    """Raises InputError where both names are of one model."""
    if os.path.realpath(os.path.expanduser(model)) == os.path.realpath(os.path.expanduser(base)):
        raise InputError(f"expected an edited model and its base; got {model} as both: name the one it was made from")


def _subjects(file: Path | None, encoding: str | None) -> list[str]:
    """The subjects in the file, or those of CounterFact's sample, each once."""
    if file is None:
        from reknow.datasets.facts import load_facts

        return list(dict.fromkeys(fact.subject for fact in load_facts("counterfact")))
    from reknow.datasets.sources import read_text

    lines = [line.strip() for line in read_text(file, str(file), encoding).split("\n")]
    if not (names := list(dict.fromkeys(filter(None, lines)))):
        raise InputError(f"expected subjects in {file}, one a line; got none: fill it, or leave --subjects out")
    return names


def _say_tensors(differences: tuple[Difference, ...], most_rank: int) -> None:
    rows = []
    for one in differences:
        rank = "" if one.rank is None else f"≥ {one.rank}" if one.rank == most_rank else str(one.rank)
        relative = "" if one.relative is None else f"{one.relative:.4f}"
        rows.append([one.tensor, " × ".join(map(str, one.shape)), rank, f"{one.norm:.4g}", relative])
    say_table(["tensor", " size", " rank", " ‖ΔW‖", " ‖ΔW‖ / ‖W‖"], rows)


def _say_subjects(difference: Difference, asked: int) -> None:
    """Shows what the change of a matrix adds where subjects are spoken of."""
    if not difference.subjects:
        return
    say(f"of {asked} subjects, {difference.tensor} changes most for:")
    say_table(["subject", " ‖ΔW k‖ / ‖W k‖"], [[one.subject, f"{one.relative:.3f}"] for one in difference.subjects])
