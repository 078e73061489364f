"""`reknow chat`: a conversation with a model in its chat template, in which patches are switched on and off."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.asking import Asked, Writing, say_answer
from reknow.cli.options import TalkOpening, read_chat
from reknow.cli.stacks import number_of_patches, sentence
from reknow.cli.terminal import say, say_table, warn
from reknow.display import paused
from reknow.errors import InputError, ModelError, ReknowError, Terminated, did_you_mean
from reknow.texts.writing import SPOKEN

if TYPE_CHECKING:
    from reknow.lm import LM
    from reknow.model.chat import Chat, Message

_HELP = """/patches   the patches, and which of them are on
/on N      put patch N on       /off N   take it off
/before    ask the last question of the model without any patch
/new       forget what was said
/help      this                 /quit    leave, as Ctrl-D does
Ctrl-C stops an answer."""


@dataclass(frozen=True)
class _LongWriting(Writing):
    """Whole answers, which end by themselves."""

    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of an answer, at most.")] = SPOKEN


def chat(*, asked: Asked, writing: _LongWriting, opening: TalkOpening) -> None:
    """Talk with a model in its chat template; /help lists what else can be typed.

    Patches are switched on and off in the conversation. Ctrl-C stops an answer, /quit or Ctrl-D the conversation.
    """
    lm = asked.open(opening)
    if not lm.tokenizer.chat_template:
        raise ModelError(
            f"expected a model with a chat template to talk with; {lm.name} has none: let it continue texts with "
            "`reknow ask`, or give a --tokenizer that has one"
        )
    from reknow.model.chat import as_chat

    template = as_chat(read_chat(opening.chat_set), lm.tokenizer, lm.name)
    assert template is not None
    talk = _Conversation(lm, template, writing)
    say(f"{lm.name} with {number_of_patches(len(lm.patches))}; /help lists what can be typed")
    with paused():  # nothing is drawn into what is typed
        _converse(talk)


def _converse(talk: _Conversation) -> None:
    """Reads lines and does what they say, until there are no more."""
    typed = sys.stdin.isatty()
    with suppress(AttributeError, ImportError):  # no editing of lines there; tests have other streams
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        if typed:
            importlib.import_module("readline")  # `input` uses it
    while True:
        try:
            line = input("> " if typed else "").strip()
            if line and not talk.take(line):
                return
        except EOFError:
            return say("") if typed else None
        except KeyboardInterrupt as stop:  # while nothing is written
            if isinstance(stop, Terminated):
                raise
            say("")
        except ReknowError as error:
            warn(error, "error")


class _Conversation:
    """What was said so far, and which patches are on."""

    def __init__(self, lm: LM, template: Chat, writing: Writing):
        self._lm, self._template, self._options = lm, template, writing.options(lm)
        self._patches, self._on = lm.patches, [True] * len(lm.patches)
        self._said: tuple[Message, ...] = ()
        self._last: tuple[tuple[Message, ...], str] | None = None
        """The last question, and what had been said before it."""
        self._commands: dict[str, Callable[[], None]] = {
            "patches": self._show_patches,
            "before": self._ask_before,
            "new": self._begin_afresh,
            "help": lambda: say(_HELP),
        }

    def take(self, line: str) -> bool:
        """Answers a question, or does what a command says. False: it was the last line.

        Raises:
            InputError: there is no such command, no such patch, or no room for the question.
            PatchError: the patch cannot be put on or taken off by itself.
        """
        if not line.startswith("/"):
            self._ask(line)
            return True
        name, *rest = line[1:].split() or [""]
        if name in ("on", "off"):
            self._switch(name, rest)
        elif name in self._commands and not rest:
            self._commands[name]()
        elif name != "quit" or rest:
            raise did_you_mean("command", line, [f"/{known}" for known in (*self._commands, "quit", "on N", "off N")])
        return name != "quit"

    def _ask(self, question: str) -> None:
        from reknow.model.chat import Message

        text = self._answer(self._said, question)
        self._last = self._said, question
        self._said = (*self._said, Message("user", question), Message("assistant", text))

    def _answer(self, said: tuple[Message, ...], question: str) -> str:
        from reknow.model.conversation import conversation

        remedy = "/new forgets what was said, and --tokens bounds an answer"
        with conversation(self._lm, self._template, said, remedy):
            return say_answer(self._lm, question, self._options)[0]

    def _ask_before(self) -> None:
        if self._last is None:
            raise InputError("expected a question before /before; got none yet: ask one")
        with self._lm.unpatched():
            self._answer(*self._last)

    def _begin_afresh(self) -> None:
        self._said, self._last = (), None

    def _switch(self, which: str, numbers: list[str]) -> None:
        known = [str(number) for number in range(1, len(self._patches) + 1)]
        if len(numbers) != 1 or numbers[0] not in known:
            got = " ".join(numbers) or "none"
            raise InputError(
                f"expected /{which} with the number of a patch, {', '.join(known) or 'of which there are none'}; got "
                f"{got}: /patches lists them"
            )
        on = [*self._on]
        on[int(numbers[0]) - 1] = which == "on"
        self._lm.restack([patch for patch, there in zip(self._patches, on, strict=True) if there])
        self._on = on
        self._show_patches()

    def _show_patches(self) -> None:
        if not self._patches:
            return say("no patches: begin with --stack or --patch to have some")
        rows = []
        for number, (patch, on) in enumerate(zip(self._patches, self._on, strict=True), 1):
            what = "; ".join(map(sentence, patch.edits[:3]))
            rows.append([str(number), "on" if on else "off", patch.id, patch.method, what])
        say_table([" N", "", "id", "method", "what"], rows)
