"""Questions in a queue, and the one thread that has the model.

It takes the oldest question, and those behind it that can be written together with it, puts on their stack, and
answers them whole.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
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

_TOGETHER = 16
"""Questions that are answered together at most, so that those of other stacks do not wait long."""


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
        tokens: written so far, for each answer.
        reasons: why each of them ended: length or stop; None while it goes on.
    """

    request: Request
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set where nobody waits any more."""


_Tell = Callable[[Piece | None], None]
"""Hands over a piece; None: there are no more."""


class _Job:
    """A question in the queue, with whom to tell what is written."""

    def __init__(
        self, answer: Answer, prompts: list[str], chat: Chat | None, patches: tuple[Patch, ...], tell: _Tell
    ):
        self.answer, self.prompts, self.chat, self.patches, self.tell = answer, prompts, chat, patches, tell
        self.done = Future[None]()
        self.told = False
        self._ends = [_Ending(answer.request.stops) for _ in prompts]

    def goes_with(self, other: _Job) -> bool:
        """Whether one pass can write both: of one stack, in one template, the likeliest tokens and as many."""
        asked, beside = self.answer.request, other.answer.request
        return (
            not (asked.temperature or beside.temperature)
            and asked.asked_tokens == beside.asked_tokens
            and (self.patches, self.chat) == (other.patches, other.chat)
        )

    def begin(self, lengths: Sequence[int], positions: int | None) -> int:
        """Takes note of the prompts' tokens; how many the answer may have."""
        self.answer.prompt_tokens = sum(lengths[:: self.answer.request.choices])
        self.answer.tokens, self.answer.reasons = [0] * len(lengths), [None] * len(lengths)
        return self.answer.request.tokens(max(lengths), positions)

    def hear(self, number: int, piece: str) -> bool:
        """Tells a piece of an answer; whether that is enough of it."""
        if self.answer.gone.is_set():
            return True
        self.answer.tokens[number] += 1
        text, enough = self._ends[number].take(piece)
        self._tell(number, text)
        if enough:
            self.answer.reasons[number] = "stop"
        return enough

    def close(self, most: int) -> None:
        """Tells what was held back, and why the answers ended."""
        for number, end in enumerate(self._ends):
            if self.answer.reasons[number] is None:
                self._tell(number, end.rest)
                self.answer.reasons[number] = "length" if self.answer.tokens[number] >= most else "stop"

    def _tell(self, number: int, text: str) -> None:
        if text:
            self.told = True
            self.tell(Piece(number, text))

    def end(self, error: Exception | None = None) -> None:
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
        self.tell(None)


class Desk:
    """Who answers, on a model that nobody else has: the oldest question first."""

    def __init__(self, lm: LM):
        self._lm = lm
        self._thread = ThreadPoolExecutor(1, "reknow model")
        self._closed = threading.Event()
        self._template = lm.chat or Chat()
        self._waiting, self._changing = deque[_Job](), threading.Lock()

    def close(self) -> None:
        """Ends what is written now, and answers nothing that waits."""
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def do(self, work: Callable[[LM], _T]) -> Future[_T]:
        """What `work` gives, once it is its turn."""
        return self._thread.submit(work, self._lm)

    async def pieces(self, answer: Answer, patches: tuple[Patch, ...]) -> AsyncIterator[Piece]:
        """The pieces of the answer as they are written.

        Raises:
            ReknowError: what is wrong with the question, before the first piece.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()

        def tell(piece: Piece | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, piece)

        job = _Job(answer, *self._asked(self._lm, answer.request), patches, tell)
        with self._changing:
            self._waiting.append(job)
        self.do(self._answer_next)  # once for each, so that those whose question went with another's find none
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            await asyncio.wrap_future(job.done)
        finally:
            answer.gone.set()

    def _answer_next(self, lm: LM) -> None:
        """Answers the oldest question, with those that go with it, in the model's thread."""
        with self._changing:
            if not self._waiting:
                return
            first = self._waiting[0]
            jobs = [job for job in self._waiting if job is first or first.goes_with(job)][:_TOGETHER]
            self._waiting = deque(job for job in self._waiting if job not in jobs)
        self._answer(lm, jobs)

    def _answer(self, lm: LM, jobs: list[_Job]) -> None:
        try:
            self._write(lm, [job for job in jobs if not job.answer.gone.is_set()])
        except Exception as error:
            if len(jobs) > 1 and not any(job.told for job in jobs):  # each by itself: it may be one's fault alone
                for job in jobs:
                    self._answer(lm, [job])
                return
            for job in jobs:
                job.end(error)
        else:
            for job in jobs:
                job.end()

    def _write(self, lm: LM, jobs: list[_Job]) -> None:
        """Writes the answers together."""
        if not jobs:
            return
        lm.chat = jobs[0].chat
        lm.restack(jobs[0].patches)
        places = [(job, number) for job in jobs for number in range(len(job.prompts))]
        prompts = [job.prompts[number] for job, number in places]
        lengths = [len(row.ids) for row in lm.encode([Text(prompt) for prompt in prompts])]
        most = min(
            job.begin([n for n, (other, _) in zip(lengths, places, strict=True) if other is job], lm.max_tokens)
            for job in jobs
        )

        def hear(place: int, piece: str) -> bool:
            if self._closed.is_set() or all(job.answer.gone.is_set() for job in jobs):
                raise _Gone
            job, number = places[place]
            return job.hear(number, piece)

        try:
            lm.generate(prompts, most, listener=hear, **jobs[0].answer.request.sampling(len(lm.tokenizer)))
        except _Gone:
            return
        for job in jobs:
            job.close(most)

    def _asked(self, lm: LM, request: Request) -> tuple[list[str], Chat | None]:
        """A prompt for each answer, and the template that they stand in.

        Raises:
            InputError: the model has no chat template, or the conversation does not end with a question.
            ModelError: the template does not take the conversation.
        """
        if isinstance(request, CompletionRequest):
            return [prompt for prompt in request.prompts for _ in range(request.choices)], None
        assert isinstance(request, ChatRequest)
        if not lm.tokenizer.chat_template:
            raise InputError(
                f"expected a model with a chat template; {lm.name} has none: ask at /v1/completions instead"
            )
        question, chat = request.conversation()
        arguments: dict[str, Any] = {**self._template.arguments, **chat.arguments}
        system = None if any(said.role == "system" for said in chat.history) else self._template.system
        return [question] * request.choices, as_chat(Chat(system, arguments, chat.history), lm.tokenizer, lm.name)


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
