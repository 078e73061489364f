"""`reknow ask`: what a model says, with its patches and without."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reknow.cli.failures import INTERRUPTED
from reknow.cli.options import DEMO, ChatOpening, Json, Opening, check_model, refuse_beside
from reknow.cli.terminal import say, say_json, say_piece, say_table, warn
from reknow.display import paused
from reknow.errors import InputError, PatchError, Terminated
from reknow.texts.writing import CONTINUED

if TYPE_CHECKING:
    from reknow.lm import LM

_BRACES = re.compile(r"\{[\w\s.'’-]+\}")
"""A name in braces, as prompts of edits have it; not what code or JSON have there."""
_EXAMPLE = 'reknow ask "The mother tongue of Danielle Darrieux is" --stack mine'


@dataclass(frozen=True)
class Asked:
    """Which model is asked."""

    model: Annotated[
        str | None,
        typer.Option("--model", help=f"The base model, or a stack folder. [{DEMO}]", callback=check_model),
    ] = None
    stack: Annotated[
        Path | None, typer.Option("--stack", help="A stack, which names its base: a folder or hub:owner/name.")
    ] = None
    patches: Annotated[
        list[Path],
        typer.Option("--patch", help="A patch to put on top, a file or hub:owner/name; repeatable, in order."),
    ] = field(default_factory=list)

    def open(self, opening: Opening) -> LM:
        """The model with its patches applied.

        Raises:
            InputError: a stack and a model are given.
            PatchError: there is no such stack or patch, or it is not of this model.
        """
        from reknow.files.hub import local
        from reknow.patching.patches import Patch
        from reknow.patching.stack import read_existing

        source = self.model or DEMO
        if self.stack is not None:
            refuse_beside("--stack, which names its base,", {"--model": self.model})
            read_existing(source := str(local(self.stack)))
        loaded = [Patch.load(path) for path in self.patches]
        lm = opening.open(source)
        try:
            for patch in loaded:
                lm.apply(patch)
        except PatchError as error:
            if self.model is None and self.stack is None:
                raise PatchError(f"{error}; no --model was named, so that {DEMO} was asked") from error
            raise
        return lm


@dataclass(frozen=True)
class Writing:
    """How answers are written."""

    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of an answer, at most.")] = CONTINUED
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="Draw tokens at this temperature; 0: the most likely ones.")
    ] = 0.0
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Draw among so many of the likeliest tokens. [all]")
    ] = None
    seed: Annotated[int, typer.Option("--seed", min=0, help="What is drawn depends on it alone.")] = 0

    def options(self, lm: LM) -> dict[str, Any]:
        """Arguments for `LM.generate`; raises InputError where something is to be drawn at temperature 0."""
        from reknow.model.conversation import sampling

        if not self.temperature:
            refuse_beside("the most likely tokens", {"--top-k": self.top_k})
        return {"max_new_tokens": self.tokens, **sampling(lm, self.temperature, self.top_k, self.seed)}


def ask(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to ask; else each line of standard input.", show_default=False)
    ] = None,
    *,
    asked: Asked,
    writing: Writing,
    beside: Annotated[bool, typer.Option("--beside", help="Also ask the model without its patches.")] = False,
    opening: ChatOpening,
    as_json: Json = False,
) -> None:
    """Say what a model says, as it is written; Ctrl-C stops the answer.

    reknow ask "The mother tongue of Danielle Darrieux is" --stack mine --beside
    """
    for prompt in prompts or ():
        if _BRACES.search(prompt):
            warn(f"the braces of “{prompt}” are asked too: leave them out, as they mark a subject for an edit alone")
    prompts = prompts or _read_prompts()
    lm = asked.open(opening)
    if beside and not lm.patches:
        raise InputError("expected patches for --beside; got a model without any: give --stack or --patch")
    options = writing.options(lm)
    if not (beside or as_json) and (len(prompts) == 1 or sys.stdout.isatty()):
        return _stream(lm, prompts, options)
    after = list(lm.generate(prompts, **options))
    with lm.unpatched() if beside else nullcontext():
        before = list(lm.generate(prompts, **options)) if beside else [None] * len(prompts)
    if as_json:
        keys = ("prompt", "answer", "before")[: 2 + beside]
        answers = [dict(zip(keys, row, strict=False)) for row in zip(prompts, after, before, strict=True)]
        return say_json({"model": lm.name, "patches": [patch.id for patch in lm.patches], "answers": answers})
    if not beside:
        return say(*(f"{prompt} … {text.strip()}" for prompt, text in zip(prompts, after, strict=True)))
    rows = [
        [f"{prompt} …", str(old).strip(), "as before" if new == old else new.strip()]
        for prompt, new, old in zip(prompts, after, before, strict=True)
    ]
    say_table(["prompt", "before", "after"], rows)


def _read_prompts() -> list[str]:
    """The lines of standard input that hold something; InputError where there are none, or a person sits there."""
    lines: list[str] = []
    if not sys.stdin.isatty():
        try:
            text = sys.stdin.buffer.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"expected prompts in UTF-8 on standard input; got {error}: convert them") from None
        lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"expected a prompt, or some on standard input, one a line; got none: {_EXAMPLE}")
    return lines


def _stream(lm: LM, prompts: list[str], options: dict[str, Any]) -> None:
    """Answers one prompt after the other, and writes as the model does; exits with 130 where one was stopped."""
    cut = False
    for prompt in prompts:
        if len(prompts) > 1:
            say_piece(f"{prompt} … ")
        _, stopped = say_answer(lm, prompt, options)
        cut |= stopped
    if cut:
        raise typer.Exit(INTERRUPTED)


def say_answer(lm: LM, prompt: str, options: dict[str, Any]) -> tuple[str, bool]:
    """Writes an answer while it comes. Ctrl-C ends it, and where nothing of it is written yet, what asked for it.

    Returns:
        what was written, and whether Ctrl-C ended it.
    """
    heard: list[str] = []

    def hear(_number: int, piece: str) -> None:
        piece = (piece if heard else piece.lstrip()).rstrip()  # only the last piece ends in spaces
        if piece:
            heard.append(piece)
            say_piece(piece)

    with paused():  # how far it is, anybody sees
        try:
            lm.generate(prompt, listener=hear, **options)
            stopped = False
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated) or not heard:
                raise
            stopped = True
        say("")
        if stopped:
            warn("the answer ends here", "stopped")
    return "".join(heard), stopped
