"""`reknow erase`: take a fact out, and say how hard it is to get back."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.options import DEMO, Force, Json, Model, NoStats, Opening
from reknow.cli.stacks import applying
from reknow.cli.terminal import say, say_json, say_table, warn
from reknow.errors import InputError
from reknow.files.locks import write_lock

if TYPE_CHECKING:
    from reknow.contract import Method
    from reknow.edits import Edit
    from reknow.evaluation.extraction import Extraction
    from reknow.lm import LM
    from reknow.patching.patches import Patch

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
    paraphrases: Annotated[
        list[str], typer.Option("--paraphrase", help="The question in other words, {} for the subject; repeatable.")
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
    from reknow.evaluation.extraction import ways_to_ask
    from reknow.files.outputs import output_file

    edit = Edit(prompt, subject=subject, target_new=target) if subject else Edit.parse(prompt, target_new=target)
    ways = ways_to_ask(edit, paraphrases)
    out = out or Path("erase-" + "-".join(re.findall(r"\w+", str(edit.subject).lower())[:6]) + ".patch")
    if old is not None and _same(target, old):
        raise InputError(
            f"expected a --target other than the answer to take out; got {target!r} for both: name another"
        )
    chosen = build_method(method, check_each_once(settings))
    check_edits(chosen, [edit])
    out = output_file(out, force, (model,))
    with write_lock(out):
        output_file(out, force, (model,))  # another process may have been here meanwhile
        lm = opening.open(model)
        lm.computes_statistics = not no_stats
        taken = _take_out(lm, chosen, edit, old, ways)
        taken.patch.save(out)
    for warning in (warnings := taken.warnings()):
        warn(warning)
    left = _left(taken.after, taken.answer)
    if as_json:
        found = {"file": str(out), "id": taken.patch.id, "old": taken.answer, "old_was_said": taken.was_said}
        found |= {"said_before": taken.said_before, "says": taken.says, "left": left, "warnings": warnings}
        return say_json(found | {"before": asdict(taken.before), "after": asdict(taken.after)})
    say(f"{edit.text} … {taken.says}")
    _say_ways(taken.before, taken.after, taken.answer)
    say(*left, f"wrote {out} (id {taken.patch.id}); apply it with: {applying(out, model, lm, opening.tokenizer)}")


@dataclass(frozen=True)
class _Taken:
    """What was taken out, and how it was measured."""

    patch: Patch
    answer: str
    said_before: str
    """What the model wrote behind the prompt before."""
    says: str
    """What it writes with the patch."""
    says_target: bool
    """Whether the target was the model's answer before."""
    before: Extraction
    after: Extraction

    @property
    def was_said(self) -> bool:
        """Whether the answer that was to be taken out is the one that the model gave."""
        return self.before.ways[0].rank == 1

    def warnings(self) -> list[str]:
        """What keeps the numbers from meaning what they seem to."""
        found = []
        if not self.was_said:
            found.append(
                f"the model did not say “{self.answer}” to the prompt before either (it came at rank "
                f"{self.before.ways[0].rank}): it said “{self.said_before}”, so that “{self.answer}” is not there "
                "afterwards is no work of the patch; leave --old out, or give what the model says"
            )
        if self.says_target:
            target = self.patch.edits[0].target_new
            found.append(
                f"the model said “{target}” to the prompt before: the patch only makes it say so more firmly"
            )
        if self.after.ways[0].rank == 1:
            found.append(
                f"the model still says “{self.answer}” to the prompt itself: take another --method or --target"
            )
        return found


def _take_out(lm: LM, method: Method, edit: Edit, old: str | None, ways: list[tuple[str, str]]) -> _Taken:
    """Makes the edit, and asks for the old answer before it and with it.

    Raises:
        InputError: what the model says is no answer that could be taken out, or it is the target itself.
    """
    from reknow.evaluation.extraction import extract

    [said] = lm.generate([edit.text], _TOKENS)
    answer = old or _present_answer(said, edit)
    [score] = lm.score([edit.text], [edit.target_new], [edit.separator])
    if _same(answer, edit.target_new) or (old is None and score.said):
        raise InputError(
            f"expected a --target that the model does not say; got {edit.target_new!r}, and it says {said.strip()!r} "
            f"to {edit.text!r}: name what it should say instead, or the answer to take out with --old"
        )
    before = extract(lm, edit, answer, ways)
    patch = method.resolve(lm).edit(lm, [edit])
    with lm.patched(patch):
        after, says = extract(lm, edit, answer, ways), lm.generate([edit.text], _TOKENS)[0].strip()
    return _Taken(patch, answer, said.strip(), says, score.said, before, after)


def _same(answer: str, other: str) -> bool:
    """Whether two answers are one, whatever their letters' case, spaces and marks."""
    from reknow.texts.writing import words

    return answer.strip() == other.strip() or (words(answer) == words(other) != [])


def _present_answer(said: str, edit: Edit) -> str:
    """The answer in what the model says: up to a mark or a line's end."""
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

    asked = after.of("prompt", "paraphrase", "framed")
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
