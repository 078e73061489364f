"""The JSON of answers, of a conversation's and of a text's, whole and piece by piece, and of refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reknow.serving.answers import Answer, Piece

_KINDS = {401: "authentication_error", 404: "not_found_error", 500: "server_error"}


def error_body(message: str, status: int) -> dict[str, Any]:
    """A refusal as OpenAI's clients read it."""
    kind = _KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


@dataclass(frozen=True)
class Shape:
    """How one kind of answer is written.

    Args:
        prefix: of its ids.
        object: what a whole answer calls itself.
        chunk: what a piece of it calls itself.
        spoken: whether it is a message, not a text.
    """

    prefix: str
    object: str
    chunk: str
    spoken: bool

    def head(self, identity: str, created: int, model: str) -> dict[str, Any]:
        return {"id": identity, "created": created, "model": model}

    def whole(self, head: dict[str, Any], texts: Sequence[str], answer: Answer) -> dict[str, Any]:
        choices = [
            {"index": number, "finish_reason": answer.reasons[number], "logprobs": None}
            | ({"message": {"role": "assistant", "content": text}} if self.spoken else {"text": text})
            for number, text in enumerate(texts)
        ]
        return {**head, "object": self.object, "choices": choices, "usage": self.usage(answer)}

    def opening(self, head: dict[str, Any], number: int) -> dict[str, Any] | None:
        """What comes before the first piece."""
        return self._chunk(head, number, {"role": "assistant", "content": ""}) if self.spoken else None

    def piece(self, head: dict[str, Any], piece: Piece) -> dict[str, Any]:
        return self._chunk(head, piece.number, {"content": piece.text}, piece.text)

    def end(self, head: dict[str, Any], number: int, reason: str | None) -> dict[str, Any]:
        return self._chunk(head, number, {}, "", reason)

    def _chunk(
        self, head: dict[str, Any], number: int, delta: dict[str, Any], text: str = "", reason: str | None = None
    ) -> dict[str, Any]:
        said = {"delta": delta} if self.spoken else {"text": text}
        choice = {"index": number, **said, "finish_reason": reason, "logprobs": None}
        return {**head, "object": self.chunk, "choices": [choice]}

    def usage(self, answer: Answer) -> dict[str, int]:
        written = sum(answer.tokens)
        return {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": answer.prompt_tokens + written,
        }


CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", spoken=True)
TEXT = Shape("cmpl", "text_completion", "text_completion", spoken=False)
