"""A conversation with a model in its chat template, and how what it says is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from reknow.errors import InputError, TextRefused
from reknow.model.chat import Chat, Message
from reknow.model.decoder import Decoder


@contextmanager
def conversation(lm: Decoder, template: Chat | None, said: Sequence[Message], remedy: str) -> Iterator[None]:
    """While open, a prompt is the next question of a conversation; without a template it is continued.

    Args:
        said: questions and answers until now.
        remedy: what makes room, where the conversation is longer than what the model has positions for.

    Raises:
        InputError: it is.
    """
    before = lm.chat
    lm.chat = None if template is None else replace(template, history=tuple(said))
    try:
        yield
    except TextRefused as error:
        raise InputError(f"{error}; {remedy}") from None
    finally:
        lm.chat = before


def sampling(lm: Decoder, temperature: float, top_k: int | None, seed: int) -> dict[str, Any]:
    """Arguments of `LM.generate` for tokens drawn at a temperature, among `top_k` or all; at 0 for the likeliest."""
    if not temperature:
        return {}
    return {"top_k": top_k or len(lm.tokenizer), "temperature": temperature, "seed": seed}
