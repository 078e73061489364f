"""What the commands share: opening models, refusing to overwrite, printing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from reknow.errors import InputError
from reknow.progress import visible

if TYPE_CHECKING:
    from reknow.lm import LM
    from reknow.model.chat import Chat as TemplateChat

DEMO = "demo:gpt2"
WIDTH = 120
"""Of tables that go to a file or a pipe."""
COMPLAINTS = 10
"""How many records that could not be read are named one by one."""


def check_model(model: str | None) -> str | None:
    """The name itself; one that stands for nothing is refused before torch is loaded, which takes seconds."""
    if model is not None and not os.path.exists(os.path.expanduser(model)):
        from reknow.model.sources import find_source

        find_source(model)
    return model


Model = Annotated[
    str,
    typer.Option(
        "--model", help="Name or path of a model, a stack folder, demo:gpt2 or demo:llama.", callback=check_model
    ),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; else the checkpoint's.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda …, or auto to spread over all devices.")]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="Name or folder of one, instead of the model's own.")
]
OwnCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code from the model's repository. Only if you trust it.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template.")]
ChatSet = Annotated[
    list[str],
    typer.Option("--chat-set", help="NAME=VALUE of the chat template, or system=TEXT; repeatable, implies --chat."),
]
NoStats = Annotated[
    bool, typer.Option("--no-stats", help="Read no text for statistics: refuse methods that need some not kept yet.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file, or a folder that reknow wrote.")]
Encoding = Annotated[
    str | None,
    typer.Option("--encoding", help="Of the file, such as cp1252 or gb18030. [utf-8, or as its mark says]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def open_lm(
    model: str,
    dtype: str | None = None,
    device: str | None = None,
    tokenizer: str | None = None,
    own_code: bool = False,
    chat: bool = False,
    chat_set: Sequence[str] = (),
) -> LM:
    """The model, without transformers' progress bars.

    Raises:
        InputError: a path that does not exist, or an unknown dtype or device.
        ModelError: it cannot be loaded or handled.
    """
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from reknow.lm import LM

    disable_progress_bar()
    set_verbosity_error()
    return LM(
        os.path.expanduser(model),
        tokenizer=tokenizer,
        dtype=dtype,
        device=None if device == "auto" else device,
        device_map="auto" if device == "auto" else None,
        chat=_chat(chat_set) if chat_set else chat,
        trust_remote_code=own_code,
    )


def _chat(settings: Sequence[str]) -> TemplateChat:
    """What the settings of the chat template say; JSON values are taken as such.

    Raises:
        InputError: one is no NAME=VALUE.
    """
    from reknow.model.chat import Chat as TemplateChat

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
    return TemplateChat(None if system is None else str(system), values)


def run_folder(name: str, model: str) -> Path:
    """Where a run goes that names no folder: models other than the demo model have their own."""
    return Path("runs") / (name if model == DEMO else f"{name}-{Path(model.rpartition(':')[2]).name}")


def refuse_beside(what: str, options: Mapping[str, object]) -> None:
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


def say(*lines: str) -> None:
    """Prints lines as they are: no markup, no wrapping of long paths."""
    for line in lines:
        console().print(visible(line), soft_wrap=True)


def say_json(value: Any) -> None:
    """Prints JSON, with its own escapes where the output has not all of Unicode."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(visible(json.dumps(value, indent=1, ensure_ascii=not unicode), "\\u{:04x}"))


def warn(message: object, what: str = "warning") -> None:
    """Prints one line on standard error."""
    print(f"{what}: {visible(' '.join(str(message).splitlines()))}", file=sys.stderr)


def warn_of_records(complaints: Sequence[str]) -> None:
    """Says which records of a file could not be read, the first ones by name."""
    for complaint in complaints[:COMPLAINTS]:
        warn(f"left out: {complaint}")
    if (more := len(complaints) - COMPLAINTS) > 0:
        warn(f"left out: {more} more records of that file")


def console() -> Console:
    """A console on the present standard output that takes texts literally."""
    width = None if sys.stdout.isatty() else WIDTH
    return Console(markup=False, highlight=False, emoji=False, width=width)


def say_table(columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
    """Prints a table; columns whose name begins with a space are numbers, set to the right."""
    table = Table(
        title=title and visible(title), title_justify="left", title_style="bold", header_style="bold", box=None
    )
    for column in columns:
        table.add_column(
            visible(column.strip()), justify="right" if column.startswith(" ") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(visible, row))
    console().print(table)
