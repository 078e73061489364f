"""Commands that examine a stack folder and answer with their status: verify, check."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reknow.cli.options import ChatOpening, Json
from reknow.cli.terminal import say, say_json, say_table

if TYPE_CHECKING:
    from reknow.evaluation.soundness import Asked
    from reknow.lm import LM
    from reknow.patching.patches import Patch

_FAILED = 1
"""The status of a stack that was examined and is not as it should be."""
_SHOWN = 20
"""How many edits that do not hold are shown."""
_Stack = Annotated[Path, typer.Argument(help="A stack: a folder or hub:owner/name.", show_default=False)]


def verify(stack: _Stack, *, opening: ChatOpening, as_json: Json = False) -> None:
    """Examine a stack: its files, the chain of its history, its base model, and every edit, asked again.

    The status is 1 where one of them is not as it should be; a changed line of the history is named.
    """
    from reknow.evaluation.soundness import ask_again
    from reknow.files.hub import local
    from reknow.patching.stack import file_problems, read_existing, read_history

    lines = read_history(stack := local(stack))
    wrong = {
        "files": file_problems(stack),
        "history": [f"line {line.number} of the history: {line.problem}" for line in lines if line.problem],
        "base": [],
        "edits": [],
    }
    asked: list[Asked] | None = None
    if not wrong["files"]:
        base, patches = read_existing(stack)
        lm = opening.open(base)
        wrong["base"] = _apply_all(lm, patches)
        asked = None if wrong["base"] else ask_again(lm)
    held = [one for one in asked or () if one.replaced is None]
    missed = [one for one in held if not one.said]
    wrong["edits"] = [f"{one.edit.text} → {one.edit.target_new} is not said any more" for one in missed]
    last = lines[-1].id if lines else None
    if as_json:
        answers = None if asked is None else [asdict(one) for one in asked]
        say_json({"sound": not any(wrong.values()), "last": last, "wrong": wrong, "edits": answers})
    else:
        ends = f", the last is {last}" if last else ""
        found = {
            "files": "every patch is there and as it was applied",
            "history": f"{len(lines)} lines, each as it was written{ends}" if lines else "none yet",
            "base": "the model on which the patches were made",
            "edits": f"{len(held)} of {len(held)} answered as wanted" + _replaced(asked or []),
        }
        for name, fine in found.items():
            if name in ("base", "edits") and asked is None and not wrong[name]:
                say(f"{name}: not asked")
            else:
                say(*(f"{name}: {problem}" for problem in wrong[name][:_SHOWN] or [fine]))
                if len(wrong[name]) > _SHOWN:
                    say(f"{name}: and {len(wrong[name]) - _SHOWN} more")
    if any(wrong.values()):
        raise typer.Exit(_FAILED)


def _replaced(asked: list[Asked]) -> str:
    number = sum(one.replaced is not None for one in asked)
    return f"; {number} that later ones replace are not asked for" if number else ""


def _apply_all(lm: LM, patches: list[Patch]) -> list[str]:
    """Puts the patches on, and says which of them belong to another base or cannot go on."""
    from reknow.errors import PatchError
    from reknow.patching.stack import FORCED

    problems = []
    for patch in patches:
        try:
            lm.apply(patch)
        except PatchError as error:
            problems.append(str(error))
            continue
        if FORCED in patch.notes:
            say(f"base: {patch.label} was made on another model and put on by force")
    return problems


def check(
    stack: _Stack,
    limits: Annotated[
        Path | None, typer.Option("--limits", help="TOML file of limits; those it leaves out are the defaults.")
    ] = None,
    *,
    opening: ChatOpening,
    as_json: Json = False,
) -> None:
    """Measure a stack against its base, and compare with limits: status 0 where all are kept, else 1.

    How many edits, how many of them are in force, other facts, perplexity and KL of plain text, and the size of the
    change; docs/limits.md says where the default limits come from.
    """
    from reknow.evaluation.limits import SHARES, Limits, compare, read_limits
    from reknow.evaluation.soundness import measure
    from reknow.files.hub import local
    from reknow.patching.stack import read_existing

    wanted = Limits() if limits is None else read_limits(limits)
    read_existing(folder := local(stack))
    health = measure(opening.open(str(folder)))
    measured = compare(health, wanted)
    sound = all(one.kept for one in measured)
    if as_json:
        rows: list[dict[str, Any]] = [{**asdict(one), "kept": one.kept} for one in measured]
        say_json({"sound": sound, "limits": rows, "health": asdict(health)})
    else:
        rows_shown = [
            [
                one.name,
                "–" if one.value is None else f"{one.value:.4g}",
                f"{'≥' if one.name in SHARES else '≤'} {one.limit:g}",
                "yes" if one.kept else "NO",
            ]
            for one in measured
        ]
        say_table(["limit", " measured", " wanted", "kept"], rows_shown)
        where = max(health.norms, key=lambda name: health.norms[name], default=None)
        say(
            f"perplexity of plain text {health.perplexity_before:.2f} → {health.perplexity:.2f}; "
            f"{health.others} other facts asked" + (f"; largest change in {where}" if where else "")
        )
        broken = [one.name for one in measured if not one.kept]
        say(f"{stack}: all limits are kept" if sound else f"{stack}: beyond its limits in {', '.join(broken)}")
    if not sound:
        raise typer.Exit(_FAILED)
