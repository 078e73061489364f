"""A language model behind an OpenAI-compatible server, asked one question at a time.

Nothing is sent anywhere unless an `LLM` is made and handed over; questions go to the server in clear text.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from reknow.errors import MissingExtra, ReknowError

__all__ = ["LLM", "NoAnswer", "NoUsableAnswer", "Reply"]

_log = logging.getLogger(__name__)


class NoAnswer(ReknowError):
    """The server is down, too slow, refuses, or answered nothing usable in all tries."""

    tokens: tuple[int, int] | None = None
    """Of the question and of the answers that were of no use, in all tries; None: the server counted none."""


class NoUsableAnswer(NoAnswer):
    """The server answers, but nothing usable in all tries."""


class Reply(NamedTuple):
    """What a model answered, and what the server counted for it."""

    text: str
    tokens_in: int | None
    """Of the question, in all tries; None: the server does not say."""
    tokens_out: int | None
    """Of the answer, in all tries."""


@dataclass(frozen=True)
class LLM:
    """Where to ask and how patiently.

    Without a key the environment variable OPENAI_API_KEY counts; many local servers want none.
    """

    model: str
    """Name of the model at the server."""
    base_url: str | None = None
    """Address of the server up to `/v1`; None: the environment variable OPENAI_BASE_URL, or OpenAI."""
    api_key: str | None = None
    timeout: float = 30.0
    """Seconds for one answer."""
    tries: int = 3
    wait: float = 1.0
    """Seconds before the second try, doubled before each further one."""
    temperature: float | None = None
    """None: what the server takes by itself."""

    def ask(self, question: str, usable: Callable[[str], bool] = bool) -> str:
        """The model's answer, asked again until it is `usable`; see `reply`."""
        return self.reply(question, usable).text

    def reply(self, question: str, usable: Callable[[str], bool] = bool) -> Reply:
        """The model's answer, asked again until it is `usable`, with the tokens that it took.

        Raises:
            MissingExtra: the package `openai` is not installed.
            NoAnswer: all tries failed; NoUsableAnswer where the last one had an answer.
        """
        try:
            import openai
        except ImportError as error:
            raise MissingExtra("openai", "llm", "asking a language model") from error
        key = self.api_key or os.environ.get("OPENAI_API_KEY") or "none"
        client = openai.OpenAI(base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=0)
        options: dict[str, Any] = {} if self.temperature is None else {"temperature": self.temperature}
        reason, failure, used = "", NoAnswer, list[tuple[int, int]]()
        with client:
            for attempt in range(self.tries):
                if attempt:
                    time.sleep(self.wait * 2 ** (attempt - 1))
                try:
                    reply = client.chat.completions.create(
                        model=self.model, messages=[{"role": "user", "content": question}], **options
                    )
                    answer = reply.choices[0].message.content or ""
                    if reply.usage is not None:
                        used.append((int(reply.usage.prompt_tokens), int(reply.usage.completion_tokens)))
                except (openai.OpenAIError, ValueError, LookupError, AttributeError, TypeError) as error:
                    reason, failure = (
                        f"{type(error).__name__}: {error}" if str(error) else type(error).__name__,
                        NoAnswer,
                    )
                else:
                    if usable(answer):
                        return Reply(answer, *(_summed(used) if used else (None, None)))
                    reason, failure = f"unusable answer {answer[:80]!r}", NoUsableAnswer
                _log.info("%s did not answer (try %d of %d): %s", self.model, attempt + 1, self.tries, reason)
        error = failure(
            f"expected an answer of {self.model} at {client.base_url}; got none in {self.tries} tries ({reason}): "
            "check the address, the key and that the server runs"
        )
        if used:
            error.tokens = _summed(used)
        raise error


def _summed(used: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(tokens_in for tokens_in, _ in used), sum(tokens_out for _, tokens_out in used)
