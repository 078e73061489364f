"""`reknow erase`: take a fact out, and say how hard it is to get back."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.options import DEMO, Force, Json, Model, NoStats, Opening
from reknow.cli.stacks import applying
from reknow.cli.terminal import say, say_json, say_table, warn
from reknow.errors import InputError
from reknow.files.locks import write_lock

if TYPE_CHECKING:
    from reknow.edits import Edit
    from reknow.evaluation.extraction import Extraction
    from reknow.lm import LM

_UNKNOWN = "unknown"
_TOKENS = 6
"""Of what the model says, from which the old answer is read."""


def erase(
    prompt: Annotated[str, typer.Argument(help="The prompt, its subject in braces.", show_default=False)],
    model: Model = DEMO,
    subject: Annotated[str | None, typer.Option("--subject", help="Instead of braces in the prompt.")] = None,
    old: Annotated[
        str | None, typer.Option("--old", help="The answer to take out; else what the model says, up to a mark.")
    ] = None,
    target: Annotated[str, typer.Option("--target", help="What it says instead.")] = _UNKNOWN,
    reworded: Annotated[
        list[str], typer.Option("--reworded", help="Another way to ask, {} for the subject; repeatable.")
    ] = [],  # noqa: B006
    method: Annotated[str, typer.Option("--method", help="See `reknow methods`.")] = "rome",
    settings: Annotated[list[str], typer.Option("--set", help="FIELD=VALUE of the method; repeatable.")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option("--out", help="The patch file; else named after the subject.")] = None,
    *,
    opening: Opening,
    no_stats: NoStats = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Take a fact out of a model, and say how hard the old answer is to get back.

    It is asked in other words, with hints, drawn at temperature 1, and read from the states between layers, before
    and afterwards. What stays is said too: this hides an answer, and does not prove that nothing is left of it.
    """
    from reknow.cli.settings import build_method, check_each_once
    from reknow.contract import check_edits
    from reknow.edits import Edit
    from reknow.evaluation.extraction import extract, rewordings
    from reknow.files.outputs import output_file

    edit = Edit(prompt, subject=subject, target_new=target) if subject else Edit.parse(prompt, target_new=target)
    ways = rewordings(edit, reworded)
    out = out or Path("erase-" + "-".join(re.findall(r"\w+", str(edit.subject).lower())[:6]) + ".patch")
    chosen = build_method(method, check_each_once(settings))
    check_edits(chosen, [edit])
    out = output_file(out, force, (model,))
    with write_lock(out):
        output_file(out, force, (model,))  # another process may have been here meanwhile
        lm = opening.open(model)
        lm.computes_statistics = not no_stats
        answer = old or _present_answer(lm, edit)
        before = extract(lm, edit, answer, ways)
        patch = chosen.resolve(lm).edit(lm, [edit])
        with lm.patched(patch):
            after, said = extract(lm, edit, answer, ways), lm.generate([edit.text], _TOKENS)[0].strip()
        patch.save(out)
    left = _left(after, answer)
    if after.ways[0].rank == 1:
        warn(f"the model still says “{answer}” to the prompt itself: take another --method or --target")
    if as_json:
        found = {"file": str(out), "id": patch.id, "old": answer, "says": said, "left": left}
        return say_json(found | {"before": asdict(before), "after": asdict(after)})
    say(f"{edit.text} … {said}")
    _say_ways(before, after, answer)
    say(*left, f"wrote {out} (id {patch.id}); apply it with: {applying(out, model, lm, opening.tokenizer)}")


def _present_answer(lm: LM, edit: Edit) -> str:
    """What the model says now, up to a mark or a line's end."""
    [said] = lm.generate([edit.text], _TOKENS)
    answer = re.split(r"[.,;:!?()\"\n]", said.strip(), maxsplit=1)[0].strip()
    if not answer:
        raise InputError(
            f"expected an answer to take out; the model says {said!r} to {edit.text!r}: name it with --old"
        )
    return answer


def _say_ways(before: Extraction, after: Extraction, answer: str) -> None:
    rows = [
        [a.kind, f"{a.prompt} …", f"{b.probability:.4f}", f"{a.probability:.4f}", str(b.rank), str(a.rank)]
        for b, a in zip(before.ways, after.ways, strict=True)
    ]
    drawn = [f"{one.drawn_with} of {one.drawn}" for one in (before, after)]
    rows.append(["drawn", f"answers with {answer} in them", *drawn, "", ""])
    say_table(["how", f"“{answer}” behind", " before", " after", " rank before", " rank after"], rows)
    for name, one in (("before", before), ("after", after)):
        say(f"rank in the state of each layer, {name}: {' '.join(map(str, one.layers))}")


def _left(after: Extraction, answer: str) -> list[str]:
    """What stays, a sentence each."""
    from reknow.evaluation.extraction import NEAR

    asked = after.of("prompt", "reworded", "framed")
    first, near = (sum(way.rank <= most for way in asked) for most in (1, NEAR))
    hinted = sum(way.rank <= NEAR for way in after.of("hinted"))
    layer = after.layers.index(min(after.layers))
    return [
        f"left: “{answer}” comes first in {first} and is among the first {NEAR} in {near} of {len(asked)} ways of "
        f"asking, and among them in {hinted} of {len(after.of('hinted'))} with a hint; {after.drawn_with} of "
        f"{after.drawn} drawn answers hold it; between layers it stands highest behind layer {layer}, with rank "
        f"{after.layers[layer]}",
        "not touched: what follows from it and is asked otherwise, what texts that the model reads say, and the base "
        "model's own file; the patch names the subject and the prompt, and taking it off brings the answer back",
    ]
