"""How far a long work is: what the library tells to whoever watches, and how the commands show it on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

PATIENCE = 5.0
"""Seconds between two lines where stderr is no terminal: a work that is done earlier says nothing."""

_CONTROLS = {*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {ord("\n"), ord("\t")}
"""What a terminal obeys instead of showing it: C0, C1 and delete; and what turns the direction of writing."""

_watcher: ContextVar[Callable[[str], object] | None] = ContextVar("watcher", default=None)


def visible(text: str, form: str = "\\x{:02x}") -> str:
    """The text with its control characters written out, so that a foreign one cannot steer the terminal."""
    return text.translate({code: form.format(code) for code in _CONTROLS})


@contextmanager
def watched(tell: Callable[[str], object]):
    """While open, `tell` hears how far a long work is, in a few words."""
    token = _watcher.set(tell)
    try:
        yield
    finally:
        _watcher.reset(token)


def told(step: int, steps: int, loss: float) -> None:
    """Says to whoever watches that `step` (from 0) of `steps` is done, and the loss before it."""
    if (tell := _watcher.get()) is not None:
        tell(f"loss {loss:.3g}, step {step + 1} of {steps}")


@contextmanager
def stage(what: str, total: int):
    """Gives a function that says to whoever watches that one more of `total` parts of a work, or several, are done.

    What a part tells by itself stands behind it.
    """
    tell, done = _watcher.get(), 0
    if tell is None:
        yield lambda parts=1: None
        return

    def say(text: str = "") -> None:
        tell(f"{what}, {done:,} of {total:,}" + (f": {text}" if text else ""))

    def advance(parts: int = 1) -> None:
        nonlocal done
        done += parts
        say()

    with watched(say):
        say()
        yield advance


@contextmanager
def progress_line(what: str):
    """While open, what is told stands on a line of stderr, which is gone afterwards.

    Where stderr is no terminal, a line is written every few seconds instead.
    """
    console = Console(file=sys.stderr)
    if console.is_terminal:
        with console.status(what) as line, watched(lambda text: line.update(Text(visible(f"{what}: {text}")))):
            yield
        return
    last = time.monotonic()

    def say(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= PATIENCE:
            print(visible(f"{what}: {text}"), file=sys.stderr, flush=True)
            last = time.monotonic()

    with watched(say):
        yield


@contextmanager
def progress_bar(shown: bool, what: str, total: int, done: int):
    """Gives two functions: one moves the progress bar on stderr, if it is shown; one puts text beside it."""
    columns = (
        *(TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), TimeRemainingColumn()),
        # A long text is cut, so that the numbers beside it stay.
        TextColumn(
            "{task.fields[now]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"), markup=False
        ),
    )
    with Progress(*columns, console=Console(file=sys.stderr), expand=True, disable=not shown) as progress:
        task = progress.add_task(what, total=total, completed=done, now="")
        yield lambda: progress.advance(task), lambda text: progress.update(task, now=visible(text))
        progress.update(task, now="")
