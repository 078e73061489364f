"""Questions in a queue, and the one thread that has the model: it puts on the stack of each, and answers it whole."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from reknow.errors import InputError
from reknow.lm import LM
from reknow.model.chat import Chat, as_chat
from reknow.model.tokens import Text
from reknow.patching.patches import Patch
from reknow.serving.requests import ChatRequest, CompletionRequest, Request

_T = TypeVar("_T")


class _Gone(Exception):
    """Nobody waits for the answer any more."""


class Piece(NamedTuple):
    """What one of the answers goes on with."""

    number: int
    text: str


@dataclass
class Answer:
    """An answer while it is written, and when it is.

    Attributes:
        prompt_tokens: of the question, template included, before a memory rewrites it.
        tokens: written so far, for each prompt.
        reasons: why each of them ended: length or stop; None while it goes on.
    """

    request: Request
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set where nobody waits any more."""


class Desk:
    """Who answers: one question after the other, as they came, on a model that nobody else has."""

    def __init__(self, lm: LM):
        self._lm = lm
        self._thread = ThreadPoolExecutor(1, "reknow model")
        self._closed = threading.Event()
        self._template = lm.chat or Chat()

    def close(self) -> None:
        """Ends what is written now; who waits still is told that nobody answers."""
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def do(self, work: Callable[[LM], _T]) -> Future[_T]:
        """What `work` gives, once the questions before it are answered."""
        return self._thread.submit(work, self._lm)

    async def pieces(self, answer: Answer, patches: tuple[Patch, ...]) -> AsyncIterator[Piece]:
        """The pieces of the answer as they are written.

        Raises:
            ReknowError: what is wrong with the question, before the first piece.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()

        def tell(piece: Piece | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, piece)

        def work(lm: LM) -> None:
            try:
                self._answer(lm, answer, patches, tell)
            finally:
                tell(None)

        done = self.do(work)
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            await asyncio.wrap_future(done)
        finally:
            answer.gone.set()

    def _answer(
        self, lm: LM, answer: Answer, patches: tuple[Patch, ...], tell: Callable[[Piece | None], None]
    ) -> None:
        """Writes the answer, in the model's thread."""
        if answer.gone.is_set():
            return
        prompts, lm.chat = self._asked(lm, answer.request)
        lm.restack(patches)
        lengths = [len(row.ids) for row in lm.encode([Text(prompt) for prompt in prompts])]
        most = answer.request.tokens(max(lengths), lm.max_tokens)
        answer.prompt_tokens, answer.tokens = sum(lengths), [0] * len(prompts)
        answer.reasons = [None] * len(prompts)
        ends = [_Ending(answer.request.stops) for _ in prompts]

        def hear(number: int, piece: str) -> bool:
            if answer.gone.is_set() or self._closed.is_set():
                raise _Gone
            answer.tokens[number] += 1
            text, enough = ends[number].take(piece)
            if text:
                tell(Piece(number, text))
            if enough:
                answer.reasons[number] = "stop"
            return enough

        try:
            lm.generate(prompts, most, listener=hear, **answer.request.sampling(len(lm.tokenizer)))
        except _Gone:
            return
        for number, end in enumerate(ends):
            if answer.reasons[number] is None:
                if rest := end.rest:
                    tell(Piece(number, rest))
                answer.reasons[number] = "length" if answer.tokens[number] >= most else "stop"

    def _asked(self, lm: LM, request: Request) -> tuple[list[str], Chat | None]:
        """The prompts, and the template that they stand in.

        Raises:
            InputError: the model has no chat template, or the conversation does not end with a question.
            ModelError: the template does not take the conversation.
        """
        if isinstance(request, CompletionRequest):
            return request.prompts, None
        assert isinstance(request, ChatRequest)
        if not lm.tokenizer.chat_template:
            raise InputError(
                f"expected a model with a chat template; {lm.name} has none: ask at /v1/completions instead"
            )
        question, chat = request.conversation()
        arguments: dict[str, Any] = {**self._template.arguments, **chat.arguments}
        system = None if any(said.role == "system" for said in chat.history) else self._template.system
        return [question], as_chat(Chat(system, arguments, chat.history), lm.tokenizer, lm.name)


class _Ending:
    """Ends a text before the first of the stops, of which it holds back what may be a beginning."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops, self.rest = stops, ""

    def take(self, piece: str) -> tuple[str, bool]:
        """(what can be told, whether that was all)."""
        text = self.rest + piece
        if found := [place for stop in self._stops if (place := text.find(stop)) >= 0]:
            self.rest = ""
            return text[: min(found)], True
        held = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        told = len(text) - held
        self.rest = text[told:]
        return text[:told], False
