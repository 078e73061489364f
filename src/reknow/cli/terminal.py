"""How commands print: texts, tables, JSON, warnings."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from reknow.display import paused, visible
from reknow.files.strict_json import strict_json

_WIDTH = 120
"""Characters in a line of tables that go to a file or a pipe."""
_COMPLAINTS = 10
"""How many records that could not be read are named one by one."""


def say(*lines: str) -> None:
    """Prints lines as they are: no markup, no wrapping of long paths."""
    for line in lines:
        with paused():
            _console().print(visible(line), soft_wrap=True)


def say_piece(text: str) -> None:
    """Prints a part of a line at once."""
    with paused():
        print(visible(text), end="", flush=True)


def say_json(value: Any) -> None:
    """Prints JSON, with its own escapes where the output has not all of Unicode."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    with paused():
        print(visible(strict_json(value, indent=1, ensure_ascii=not unicode), "\\u{:04x}"))


def warn(message: object, what: str = "warning") -> None:
    """Prints one line on standard error."""
    with paused():
        print(f"{what}: {visible(' '.join(str(message).splitlines()))}", file=sys.stderr)


class LogHandler(logging.StreamHandler):
    """Prints records on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        with paused():
            super().emit(record)


def warn_of_records(complaints: Sequence[str]) -> None:
    """Says which records of a file could not be read, the first ones by name."""
    for complaint in complaints[:_COMPLAINTS]:
        warn(f"left out: {complaint}")
    if (more := len(complaints) - _COMPLAINTS) > 0:
        warn(f"left out: {more} more records of that file")


def _console() -> Console:
    """A console on the present standard output that takes texts literally."""
    width = None if sys.stdout.isatty() else _WIDTH
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
    with paused():
        _console().print(table)
