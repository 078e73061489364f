"""How far a long work is, on stderr."""

from __future__ import annotations

import sys
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column


@contextmanager
def progress_bar(shown: bool, what: str, total: int, done: int):
    """Gives two functions: one moves the progress bar on stderr, if it is shown; one puts text beside it."""
    columns = (
        *(TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), TimeRemainingColumn()),
        # A long text is cut, so that the numbers beside it stay.
        TextColumn("{task.fields[now]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=Console(file=sys.stderr), expand=True, disable=not shown) as progress:
        task = progress.add_task(what, total=total, completed=done, now="")
        yield lambda: progress.advance(task), lambda text: progress.update(task, now=text)
        progress.update(task, now="")
