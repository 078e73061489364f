"""Prompts in a tokenizer's chat template: system message, the template's arguments, and a thought that it opens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jinja2 import TemplateError

from reknow.errors import InputError, ModelError

_THOUGHT = re.compile(
    r"([<\[◁]\|?)(\w*[_:])?(think\w*|thought\w*|reason\w*|reflect\w*)(\|?[>\]▷])\s*$", re.IGNORECASE
)
_QUESTION_MARKS = ("?", "？", "؟")
_ENDS = {"begin_": "end_", "begin_of_": "end_of_", "start_": "end_"}


class Message(NamedTuple):
    """What one side of a conversation said."""

    role: str
    """system, user or assistant, as the template names them."""
    content: str


@dataclass(frozen=True)
class Chat:
    """What a chat template is filled with besides the prompt, which becomes a user's message."""

    system: str | None = None
    """A system message in front."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Names that the template asks for, such as {"enable_thinking": False}."""
    history: Sequence[Message] = ()
    """What was said before the prompt, behind the system message."""

    def head(self, tokenizer, prompt: str) -> str:
        """All that stands before the answer. A thought that the template opens is closed, since what is asked for is
        the answer.

        Raises:
            ModelError: the template refuses the messages.
        """
        messages = [] if self.system is None else [Message("system", self.system)]
        said = [message._asdict() for message in (*messages, *self.history, Message("user", prompt))]
        options = {**self.arguments, "tokenize": False, "add_generation_prompt": True}
        try:
            head = tokenizer.apply_chat_template(said, **options)
        except TemplateError as error:
            roles = " and ".join(dict.fromkeys(message["role"] for message in said))
            raise ModelError(
                f"expected a chat template that takes {roles} messages; it says "
                f"{str(error)!r}: leave the system message out, or use chat=False"
            ) from error
        return close_thought(head)


def close_thought(head: str) -> str:
    """The text with the thought closed, empty, that its end opens: `<think>`, `[THINK]`, `<|START_THINKING|>` …"""
    opened = _THOUGHT.search(head)
    if opened is None:
        return head
    left, before, name, right = opened.groups(default="")
    end = _ENDS.get(before.lower())
    closing = f"{left}/{before}{name}{right}"
    if end is not None:
        closing = f"{left}{end.upper() if before.isupper() else end}{name}{right}"
    return f"{head.rstrip()}\n\n{closing}\n\n"


def as_chat(chat: bool | Chat | None, tokenizer, name: str) -> Chat | None:
    """How prompts are put into the tokenizer's template; None where they are not.

    Raises:
        ModelError: the tokenizer has no template, or it refuses a system message.
        InputError: the template does not ask for an argument that is given.
    """
    if not chat:
        return None
    if not tokenizer.chat_template:
        raise ModelError(f"expected a tokenizer with a chat template; {name} has none: use chat=False")
    chat = Chat() if chat is True else chat
    if not isinstance(chat, Chat):
        raise InputError(f"expected True, False or a Chat as 'chat'; got {chat!r}: give one of these")
    for argument in chat.arguments:
        if not re.search(rf"\b{re.escape(argument)}\b", str(tokenizer.chat_template)):
            raise InputError(
                f"expected arguments that the chat template of {name} asks for; got {argument!r}, which it does not "
                "name: leave it out, or correct its spelling"
            )
    chat.head(tokenizer, "?")
    return chat


def asked_without_template(tokenizer, chat: Chat | None, prompts: Iterable[str]) -> str | None:
    """The first question that is put to a chat model outside its template, which continues it rather than answers.

    A sentence to complete needs no template; only what ends as a question tells that an answer is expected.
    """
    if chat is not None or not tokenizer.chat_template:
        return None
    return next((prompt for prompt in prompts if prompt.rstrip().endswith(_QUESTION_MARKS)), None)
