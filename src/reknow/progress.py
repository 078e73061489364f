"""How far a long work is: what the library reports, and how the commands show it on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

PATIENCE = 5.0
"""Seconds between two lines where stderr is no terminal: a work that is done earlier says nothing."""

_CONTROLS = {*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {ord("\n"), ord("\t")}
"""What a terminal obeys instead of showing it: C0, C1 and delete; and what turns the direction of writing."""


def visible(text: str, form: str = "\\x{:02x}") -> str:
    """The text with its control characters written out, so that a foreign one cannot steer the terminal."""
    return text.translate({code: form.format(code) for code in _CONTROLS})


class Progress(threading.local):
    """How far a long work on a model is, in a few words for the callback that a thread has set, if any."""

    callback: Callable[[str], object] | None = None

    @contextmanager
    def reported_to(self, callback: Callable[[str], object]):
        """While open, the callback is called with each report."""
        before, self.callback = self.callback, callback
        try:
            yield
        finally:
            self.callback = before

    def step(self, step: int, steps: int, loss: float) -> None:
        """Reports that `step` (from 0) of `steps` is done, and the loss before it."""
        if self.callback is not None:
            self.callback(f"loss {loss:.3g}, step {step + 1} of {steps}")

    @contextmanager
    def stage(self, what: str, total: int):
        """Gives a function that reports that one more of `total` parts of a work, or several, are done.

        What a part reports by itself stands behind it.
        """
        callback, done = self.callback, 0
        if callback is None:
            yield lambda parts=1: None
            return

        def report(text: str = "") -> None:
            callback(f"{what}, {done:,} of {total:,}" + (f": {text}" if text else ""))

        def advance(parts: int = 1) -> None:
            nonlocal done
            done += parts
            report()

        with self.reported_to(report):
            report()
            yield advance


@contextmanager
def progress_line(progress: Progress, what: str):
    """While open, what is reported stands on a line of stderr, which is gone afterwards.

    Where stderr is no terminal, a line is written every few seconds instead.
    """
    console = Console(file=sys.stderr)
    if console.is_terminal:
        with (
            console.status(what) as line,
            progress.reported_to(lambda text: line.update(Text(visible(f"{what}: {text}")))),
        ):
            yield
        return
    last = time.monotonic()

    def write(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= PATIENCE:
            print(visible(f"{what}: {text}"), file=sys.stderr, flush=True)
            last = time.monotonic()

    with progress.reported_to(write):
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
    with Bar(*columns, console=Console(file=sys.stderr), expand=True, disable=not shown) as bar:
        task = bar.add_task(what, total=total, completed=done, now="")
        yield lambda: bar.advance(task), lambda text: bar.update(task, now=visible(text))
        bar.update(task, now="")
