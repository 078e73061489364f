"""How far a long work is, on stderr: one line of a terminal that goes away, or lines now and then in a file or pipe.

A timer writes, not the work, so that a step which takes minutes is no silence, and a step that takes none costs none.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TextIO

__all__ = ["Display", "clock", "duration", "first_timed", "known_share", "paused", "visible"]

clock = time.monotonic
PATIENCE, PERIOD, REFRESH = 2.0, 5.0, 0.25
"""Seconds: a work that is done earlier shows nothing; between two lines; between two pictures on a terminal."""
_BAR, _NARROW = 12, 60
"""Width of the bar on a terminal, and of a terminal that has no bar, in columns."""

_CONTROLS = {*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {ord("\n"), ord("\t")}
"""What a terminal obeys instead of showing it: C0, C1 and delete; and what turns the direction of writing."""

_screen = threading.RLock()
"""Held by who writes: work in several threads, and what a command prints meanwhile, do not mix."""
_drawn: list[Display] = []
"""The one that the terminal shows, if any: it has one line for all threads."""


def visible(text: str, form: str = "\\x{:02x}") -> str:
    """The text with its control characters written out, so that a foreign one cannot steer the terminal."""
    return text.translate({code: form.format(code) for code in _CONTROLS})


def duration(seconds: float) -> str:
    """The seconds in words: 8 s, 2:05 min, 1:20 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02} h"


class Shown(Protocol):
    """What a display shows: a work among works."""

    @property
    def share(self) -> float | None: ...
    @property
    def left(self) -> float | None: ...
    @property
    def path(self) -> list[Any]: ...
    def text(self, timed: Any = None) -> str: ...


def first_timed(work: Shown) -> Any:
    """The outermost of the works around it, and itself, that can tell how long it takes still; None: none can."""
    return next((each for each in work.path if each.left is not None), None)


def known_share(work: Shown) -> float | None:
    """How much is done of the outermost of these that can tell; None: none can."""
    return next((each.share for each in work.path if each.share is not None), None)


class Display:
    """Shows the work that was heard of last, from `PATIENCE` seconds after it was opened until it is closed."""

    def __init__(self, stream: TextIO):
        self._stream, self._begun, self._last = stream, clock(), -PERIOD
        self._terminal = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._work: Shown | None = None
        self._live: Any = None
        self._closed = threading.Event()
        self._timer = threading.Thread(target=self._run, name="reknow progress", daemon=True)

    def hear(self, work: Shown) -> None:
        """Shows this work from now on."""
        self._work = work

    def __enter__(self) -> Display:
        self._timer.start()
        return self

    def __exit__(self, *_error) -> None:
        self._closed.set()
        self._timer.join()

    def _run(self) -> None:
        try:
            while not self._closed.wait(REFRESH):
                self.tick()
        finally:
            with _screen, suppress(OSError, ValueError):
                self.hide()

    def tick(self) -> None:
        """Writes what it is time for."""
        now, work = clock(), self._work
        if work is None or now - self._begun < PATIENCE:
            return
        timed = first_timed(work)
        with _screen, suppress(OSError, ValueError):  # the stream may be full, or closed
            if self._terminal:
                self._draw(work, timed, now)
            elif now - self._last >= PERIOD:
                self._last = now
                said = " ".join(work.text(timed).split())
                print(f"{visible(said)} ({duration(now - self._begun)} so far)", file=self._stream, flush=True)

    def _draw(self, work: Shown, timed: Shown | None, now: float) -> None:
        """Draws the line, if the terminal shows no other."""
        from rich.console import Console
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if _drawn not in ([], [self]):
            return
        if self._live is None:
            _drawn[:] = [self]
            console = Console(file=self._stream, force_terminal=True)
            self._live = Live(
                console=console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,  # rich would send it to stderr
                redirect_stderr=False,
            )
            self._live.start()
        line, wide = Table.grid(padding=(0, 2, 0, 0), expand=True), self._live.console.width >= _NARROW
        if wide:
            line.add_column(width=_BAR)
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        share = known_share(work)
        bar = ProgressBar(1, share or 0, width=_BAR, pulse=not share, animation_time=now)
        said = Text(visible(" ".join(work.text(timed).split())), no_wrap=True, overflow="ellipsis")
        line.add_row(*([bar] if wide else []), Text(duration(now - self._begun)), said)
        self._live.update(line, refresh=True)

    def hide(self) -> None:
        """Takes the line from the terminal; it comes back at the next tick."""
        live, self._live = self._live, None
        if live is not None:
            _drawn.clear()
            live.stop()


@contextmanager
def paused():
    """While open, no display writes and the terminal has no line, so that something else may be printed."""
    with _screen:
        for display in [*_drawn]:
            display.hide()
        yield
