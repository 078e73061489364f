"""Questions that both models were asked, the base as it is and with a tab's patches, and what they said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from reknow.checks.bounds import Natural, NonNegative, Seed, check_settings
from reknow.errors import InputError
from reknow.lm import LM
from reknow.model.chat import Chat, Message, as_chat
from reknow.model.conversation import conversation, sampling
from reknow.patching.patches import Patch
from reknow.texts.differences import Run, differing
from reknow.texts.writing import CONTINUED, SPOKEN
from reknow.ui.work import Cancelled, Work, applied

_FEWER = "fewer tokens bound an answer"


@dataclass(frozen=True)
class Settings:
    """How answers are written; checked when it is made."""

    tokens: Natural = 0
    """Tokens of an answer, at most; 0: as many as `reknow ask` and `reknow chat` have."""
    temperature: NonNegative = 0.0
    """0: the likeliest tokens."""
    top_k: Natural = 0
    """Drawn among so many; 0: among all."""
    seed: Seed = 0
    template: bool = True
    """Whether a model with a chat template talks in it."""

    def __post_init__(self) -> None:
        check_settings(self)

    def most(self, talks: bool) -> int:
        """Tokens of an answer in a conversation, or of a text that is continued, at most."""
        return self.tokens or (SPOKEN if talks else CONTINUED)

    @property
    def told(self) -> str:
        """How tokens were chosen, in a sentence."""
        if not self.temperature:
            return "Of all tokens the likeliest."
        among = f", among the {self.top_k:,} likeliest" if self.top_k else ""
        return f"Drawn at temperature {self.temperature:g}{among}, seed {self.seed} for both."


@dataclass
class Answer:
    """What a model said."""

    text: str = ""
    stopped: bool = False
    """Whether it was stopped before its end."""


@dataclass
class Turn:
    """A question and both answers."""

    question: str
    settings: Settings
    patches: int
    """How many were on; with none both models are one."""
    talks: bool = False
    """Whether it was asked in the chat template."""
    before: Answer | None = None
    """Of the base model; None: it has not begun."""
    after: Answer | None = None
    """Of the model with the patches."""

    @property
    def answers(self) -> list[Answer]:
        return [answer for answer in (self.before, self.after) if answer is not None]

    @property
    def same(self) -> bool:
        """Whether both models wrote the same, to the end."""
        both = self.answers
        return len(both) == 2 and not both[1].stopped and both[0].text == both[1].text

    @cached_property
    def marked(self) -> tuple[list[Run], list[Run]]:
        """Both answers with the words that differ, once they are written."""
        assert self.before is not None
        if self.after is None:
            return [Run(self.before.text, False)], []
        return differing(self.before.text, self.after.text, unfinished=self.after.stopped)


@dataclass
class Talk:
    """What was asked and said, and what is being said."""

    turns: list[Turn] = field(default_factory=list)
    now: Turn | None = None
    """The one that goes on."""
    settings: Settings = Settings()
    back: tuple[Work | None, str] | None = None
    """A question that came to nothing, and the work that was to answer it: it goes back to who wrote it."""

    def ask(self, lm: LM, patches: Sequence[Patch], question: str, settings: Settings) -> None:
        """Asks the base model and then the one with the patches; who looks at `now` meanwhile sees what is written.

        Raises:
            InputError: there is no question, or no room for it.
            PatchError: the patches do not fit the model.
            Cancelled: before anything was written. Later on, what was written stays.
        """
        if not question.strip():
            raise InputError("expected a question, or the beginning of a text; got none: write one")
        template = as_chat(settings.template and bool(lm.tokenizer.chat_template), lm.tokenizer, lm.name)
        self.now = turn = Turn(question, settings, len(patches), template is not None)
        try:
            turn.before = Answer()
            with lm.unpatched():
                self._write(lm, template, turn, turn.before)
            if patches:
                turn.after = Answer()
                with applied(lm, patches):
                    self._write(lm, template, turn, turn.after)
        except Cancelled:
            if not any(answer.text for answer in turn.answers):
                raise
            turn.answers[-1].stopped = True
            if turn.after is None and patches:
                turn.after = Answer(stopped=True)
        finally:
            self.now = None
        self.turns.append(turn)

    def _write(self, lm: LM, template: Chat | None, turn: Turn, answer: Answer) -> None:
        """Writes an answer while the model does."""
        settings, heard = turn.settings, list[str]()

        def hear(_number: int, piece: str) -> None:
            heard.append(piece)
            answer.text = "".join(heard).strip()

        options = sampling(lm, settings.temperature, settings.top_k or None, settings.seed)
        said = self._said(answer is turn.after) if template else []
        remedy = f"a new conversation forgets what was said, and {_FEWER}" if said else _FEWER
        with conversation(lm, template, said, remedy):
            lm.generate(turn.question, settings.most(turn.talks), listener=hear, **options)

    def _said(self, after: bool) -> list[Message]:
        """What was said to one of the models and by it; it does not know the other one's answers."""
        said: list[Message] = []
        for turn in self.turns:
            answer = turn.after if after and turn.patches else turn.before
            if turn.talks and answer is not None and answer.text:
                said += [Message("user", turn.question), Message("assistant", answer.text)]
        return said
