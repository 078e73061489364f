"""Options that several commands share, and groups of options as one argument of a command."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from reknow.errors import InputError
from reknow.progress import progress

if TYPE_CHECKING:
    from reknow.lm import LM
    from reknow.model.chat import Chat

DEMO = "demo:gpt2"


def check_model(model: str | None) -> str | None:
    """The name itself; one that stands for nothing is refused before torch is loaded, which takes seconds."""
    if model is not None and not os.path.exists(os.path.expanduser(model)):
        from reknow.files.hub import is_address, read_address
        from reknow.model.sources import find_source

        if is_address(model):
            read_address(model)
        else:
            find_source(model)
    return model


Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Name or path of a model, a stack (a folder or hub:owner/name), demo:gpt2, demo:llama or demo:smollm2.",
        callback=check_model,
    ),
]
Families = Annotated[Path | None, typer.Option("--families", help="File of task families; else the bundled one.")]
NoStats = Annotated[
    bool, typer.Option("--no-stats", help="Read no text for statistics: refuse methods that need some not kept yet.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file, or a folder that reknow wrote.")]
Encoding = Annotated[
    str | None,
    typer.Option("--encoding", help="Of the file, such as cp1252 or gb18030. [utf-8, or as its mark says]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@dataclass(frozen=True)
class Opening:
    """How a model is opened."""

    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; else the checkpoint's.")
    ] = None
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda …, or auto to spread over all devices.")
    ] = None
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Name or folder of one, instead of the model's own.")
    ] = None
    own_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code from the model's repository. Only if you trust it.")
    ] = False

    def open(self, model: str) -> LM:
        """The model, without what transformers says.

        Raises:
            InputError: a path that does not exist, or an unknown dtype or device.
            ModelError: it cannot be loaded or handled.
        """
        with progress.stage(f"opening {model}"):  # as `LM` says itself, but the imports take seconds too
            from transformers.utils.logging import set_verbosity_error

            from reknow.lm import LM

            set_verbosity_error()
            return LM(
                os.path.expanduser(model),
                tokenizer=self.tokenizer,
                dtype=self.dtype,
                device=None if self.device == "auto" else self.device,
                device_map="auto" if self.device == "auto" else None,
                chat=self.template,
                trust_remote_code=self.own_code,
            )

    @property
    def template(self) -> bool | Chat:
        """How prompts are put into the chat template."""
        return False


_ChatSettings = Annotated[
    list[str], typer.Option("--chat-set", help="NAME=VALUE of the chat template, or system=TEXT; repeatable.")
]


@dataclass(frozen=True)
class ChatOpening(Opening):
    """How a model is opened, perhaps with a chat template."""

    chat: Annotated[
        bool, typer.Option("--chat", help="Use the tokenizer's chat template; --chat-set implies it.")
    ] = False
    chat_set: _ChatSettings = field(default_factory=list)

    @property
    def template(self) -> bool | Chat:
        """What the settings of the chat template say."""
        return read_chat(self.chat_set) if self.chat_set else self.chat


@dataclass(frozen=True)
class TalkOpening(Opening):
    """How a model is opened that is talked to in its chat template in any case."""

    chat_set: _ChatSettings = field(default_factory=list)


def read_chat(settings: list[str]) -> Chat:
    """What the settings of a chat template say; JSON values are taken as such.

    Raises:
        InputError: one is no NAME=VALUE.
    """
    from reknow.model.chat import Chat

    values: dict[str, Any] = {}
    for setting in settings:
        name, given, value = setting.partition("=")
        if not given or not name.strip():
            raise InputError(f"expected --chat-set NAME=VALUE; got {setting!r}: write it so")
        try:
            values[name.strip()] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            values[name.strip()] = value
    system = values.pop("system", None)
    return Chat(None if system is None else str(system), values)


def flatten(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer wants it: the fields of an argument that is a dataclass are options of their own."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))
            continue
        own = get_type_hints(groups[name], include_extras=True)
        for each in fields(groups[name]):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            parameters.append(
                inspect.Parameter(each.name, parameter.KEYWORD_ONLY, default=default, annotation=own[each.name])
            )

    @wraps(command)
    def run(**given: Any) -> None:
        made = {
            name: group(**{each.name: given.pop(each.name) for each in fields(group)})
            for name, group in groups.items()
        }
        return command(**given, **made)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def refuse_beside(what: str, options: dict[str, object]) -> None:
    """Raises InputError where options are given, not None, False or empty, that mean nothing beside `what`."""
    given = [option for option, value in options.items() if value not in (None, False, [])]
    if given:
        raise InputError(
            f"expected {what} alone; got {' and '.join(given)} too, which it does not read: leave one out"
        )


def whole_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """The numbers of an option, with commas between; None where it is not given.

    Raises:
        InputError: something else.
    """
    try:
        return None if text is None else tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"expected {option} as whole numbers with commas; got {text!r}: correct it") from None
