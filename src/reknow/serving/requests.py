"""What clients ask: bodies of OpenAI's protocol, checked; what is not done here is refused, not passed over."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue

from reknow.errors import InputError
from reknow.files.schema import FormatError, Listed, Object, Strict, parse_json
from reknow.model.chat import Chat, Message
from reknow.texts.writing import SPOKEN

_PASSED_OVER = frozenset(("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"))
"""Fields that change nothing in an answer."""
_NEUTRAL: Mapping[str, tuple[JsonValue, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields that are taken where they ask for nothing: their values that do."""
_MOST_CHOICES = 16
"""Answers to one question at most."""


class _StreamOptions(Strict):
    open: ClassVar[bool] = True

    include_usage: bool = False


class Request(Strict):
    """What both ways to ask have in common."""

    open: ClassVar[bool] = True

    model: Annotated[str, Field(min_length=1)]
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts before which an answer ends."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, stop))

    @property
    def choices(self) -> int:
        """How many answers to each question are wanted."""
        return self.n or 1

    @property
    def asked_tokens(self) -> int | None:
        """Tokens that the request wants at most; None: it does not say."""
        return self.max_tokens

    def sampling(self, vocabulary: int) -> dict[str, Any]:
        """Arguments of `LM.generate`: the likeliest tokens, whatever else is asked for, without a temperature."""
        if not self.temperature:
            return {}
        return {
            "top_k": min(self.top_k or vocabulary, vocabulary),
            "temperature": self.temperature,
            "top_p": self.top_p or 1.0,
            "seed": secrets.randbits(63) if self.seed is None else self.seed % 2**63,
        }

    def tokens(self, longest_prompt: int, positions: int | None) -> int:
        """Tokens of an answer at most: as asked, else as many as there is room for, up to 256."""
        if self.asked_tokens is not None:
            return self.asked_tokens
        return SPOKEN if positions is None else max(1, min(SPOKEN, positions - longest_prompt))


class CompletionRequest(Request):
    """A text to continue, or several."""

    prompt: str | Annotated[list[str], Field(min_length=1)]

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class _Part(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class _Said(Strict):
    open: ClassVar[bool] = True

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class ChatRequest(Request):
    """A conversation whose last message is to be answered."""

    messages: Annotated[Listed[_Said], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    chat_template_kwargs: Object | None = None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def conversation(self) -> tuple[str, Chat]:
        """The question, and the template's contents with all that was said before it.

        Raises:
            InputError: the last message is not a user's.
        """
        *before, last = (said.message() for said in self.messages)
        if last.role != "user":
            raise InputError(f"expected a user's message at the end; got one of {last.role}: put a question there")
        return last.content, Chat(arguments=self.chat_template_kwargs or {}, history=tuple(before))


def read_request(kind: type[Request], body: bytes) -> Any:
    """The body as a request of that kind.

    Raises:
        InputError: it is no JSON, lacks what is needed, or asks for what is not done here.
    """
    try:
        request = parse_json(kind, body)
    except FormatError as error:
        raise InputError(
            f"expected a request of OpenAI's API, with prompts as texts; got another ({error}): correct it"
        ) from None
    for name, value in (request.model_extra or {}).items():
        if value is None or name in _PASSED_OVER or value in _NEUTRAL.get(name, ()):
            continue
        raise InputError(
            f"expected a request without {name!r}, which is not done here; got {value!r:.60}: leave it out"
        )
    return request
