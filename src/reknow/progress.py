"""How far a long work is: stages inside each other, and an estimate of what is left.

Whoever does something long opens a stage, or goes through `each`, and need not know who listens: a function of the
user's, or a display on stderr, which commands open and work in Python opens by itself where stderr is a terminal.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from reknow import display
from reknow.display import Display, duration

__all__ = ["Progress", "Stage", "named", "progress"]

_T = TypeVar("_T")
_P = ParamSpec("_P")

_MEMORY, _PARTS = 15.0, 0.75
"""The rate remembers so many seconds; of slow parts, each has so much of the weight of the one behind it."""
_FAST = 10  # parts a second from which on the rate is shown


class _Frame:
    """Lives as long as the call that opened a stage, or hears of them: an interrupt may hit while it cleans up."""


class Stage:
    """A work that goes on, and how much of it is done. `total` None: nobody knows how much it is."""

    def __init__(self, what: str, total: float | None, unit: str, done: float, above: Stage | None, parts: float):
        self.what, self.total, self.unit, self.done, self.above, self.note = what, total, unit, done, above, ""
        self.frame: Callable[[], _Frame | None] = lambda: None
        self._parts, self._inside = parts, 0.0  # of the work around this; what works inside did of the present part
        self._begun = self._moved = display.clock()
        self._position, self._gain, self._seconds = done, 0.0, 0.0  # the last two: sums that forget

    def advance(self, parts: float = 1) -> None:
        """Takes note that so many more parts are done."""
        self.done, self._inside = self.done + parts, 0.0
        self._look()

    def _look(self) -> None:
        """Takes note of how far it is, for this stage and those around it whose share is known."""
        now, position = display.clock(), self.done + self._inside
        if (gain := position - self._position) <= 0:
            return
        seconds = now - self._moved
        kept = max(math.exp(-seconds / _MEMORY), _PARTS**gain)
        self._gain, self._seconds = self._gain * kept + gain, self._seconds * kept + seconds
        self._position, self._moved = position, now
        if self.above is not None and self._parts and self.total != 0:
            self.above._inside += self._parts * gain / (self.total or 1)
            self.above._look()

    @property
    def share(self) -> float | None:
        """How much is done, 0 to 1, with what works inside did; None: nobody knows."""
        return min(self._position / self.total, 1.0) if self.total else None

    @property
    def left(self) -> float | None:
        """Seconds that are left, by the rate of late; None: too early to tell, or later than was foreseen."""
        now = display.clock()
        if not self.total or not self._gain or now - self._begun < 1:
            return None
        left = (self.total - self._position) * self._seconds / self._gain - (now - self._moved)
        return left if left >= 1 else None

    @property
    def path(self) -> list[Stage]:
        """The stages around this one, from the outermost on, and itself; without those that say nothing."""
        return [stage for stage in self.chain if stage.what and (stage.total != 1 or stage is self)]

    @property
    def chain(self) -> list[Stage]:
        """All stages around this one, from the outermost on, and itself."""
        return [*([] if self.above is None else self.above.chain), self]

    def text(self, timed: Stage | None = None) -> str:
        """What it and the works around it do, and how far they are; behind `timed`, how long that one takes still."""
        words: list[str] = []
        for stage in self.path:
            said = stage.what
            if stage.total is not None and stage.total > 1:
                said += f", {stage.done:,} of {stage.total:,}" + (f" {stage.unit}" if stage.unit else "")
            said += f", {stage.note}" if stage.note else ""
            if stage is timed and (left := stage.left) is not None:
                said += f", {rate:,.0f} a second" if (rate := stage._gain / stage._seconds) >= _FAST else ""
                said += f", {duration(left)} left"
            if said not in words[-1:]:
                words.append(said)
        return ": ".join(words)

    __str__ = text


class _Hearing(NamedTuple):
    callback: Callable[[Stage], object]
    above: _Hearing | None
    frame: Callable[[], _Frame | None]


_Opened = TypeVar("_Opened", Stage, _Hearing)


def _open(innermost: _Opened | None) -> _Opened | None:
    """The innermost one whose call still goes on: this one, or one around it."""
    while innermost is not None and innermost.frame() is None:
        innermost = innermost.above
    return innermost


class _Here(threading.local):
    """What a thread works on, and who hears of it. No ContextVar: a loop that an error has left may end when Python
    collects what the error held, in the midst of anything, and to set one while one is being set crashes Python."""

    innermost: Stage | None = None
    hearing: _Hearing | None = None

    @property
    def stage(self) -> Stage | None:
        """The innermost stage that is open."""
        self.innermost = _open(self.innermost)
        return self.innermost

    @property
    def listener(self) -> Callable[[Stage], object] | None:
        self.hearing = _open(self.hearing)
        return self.hearing and self.hearing.callback


_here = _Here()


class Progress:
    """Opens stages, and says who hears of them: in this thread alone, and whatever model is worked on."""

    @contextmanager
    def stage(self, what: str, total: float | None = None, *, unit: str = "", done: float = 0, parts: float = 0):
        """Gives `advance(parts=1)`, which says that so many more of `total` parts of a work are done.

        Args:
            done: parts that an earlier run did.
            parts: how many parts of the work around it this work is, for its estimate; 0: nobody knows.
        """
        above, hears, frame = _here.stage, _here.listener, _Frame()
        stage = Stage(what, total, unit, done, above, parts)
        stage.frame = weakref.ref(frame)
        if above is not None and above.total is None:
            above.note = ""
        with self.shown() if hears is None and above is None and _shows(False) else nullcontext():
            hears = _here.listener or (lambda stage: None)

            def advance(parts: float = 1) -> None:
                stage.advance(parts)
                hears(stage)

            _here.innermost = stage
            try:
                hears(stage)
                yield advance
                if total is not None and stage.done < total:  # it was done sooner than it might have been
                    advance(total - stage.done)
            finally:
                if _here.stage is not None and stage in _here.stage.chain:  # else one around it has ended first
                    _here.innermost = above
                    if above is not None:
                        hears(above)

    def each(self, what: str, items: Collection[_T], *, unit: str = "", parts: float = 0) -> Iterator[_T]:
        """The items one after the other, as a stage of so many parts. For `for`: what else holds it holds it open."""
        with self.stage(what, len(items), unit=unit, parts=parts) as advance, suppress(GeneratorExit):
            for item in items:
                yield item
                advance()

    def note(self, text: str) -> None:
        """Puts a few words behind the innermost stage, such as a loss."""
        if _here.stage is not None:
            _here.stage.note = text

    @contextmanager
    def reported_to(self, callback: Callable[[Stage], object]):
        """While open, the callback is called, with the innermost stage, whenever one begins, moves or ends."""
        frame, before = _Frame(), _here.hearing
        _here.hearing = _Hearing(callback, before, weakref.ref(frame))
        try:
            yield
        finally:
            _here.hearing = before

    @contextmanager
    def shown(self, what: str = ""):
        """While open, work that lasts longer than two seconds is shown on stderr: on a terminal by one line that goes
        away, else by a line every few seconds. With REKNOW_PROGRESS=0, and where others listen, by nothing."""
        if _here.listener is not None or not _shows(True):
            with self.stage(what):
                yield
            return
        with Display(sys.stderr) as line, self.reported_to(line.hear), self.stage(what):
            self.note("starting")  # until something begins inside
            yield


def _shows(asked: bool) -> bool:
    """Whether work is shown: where it is asked for, at a terminal, in a notebook, or if REKNOW_PROGRESS=1."""
    wish, first = os.environ.get("REKNOW_PROGRESS"), os.environ.get("LOCAL_RANK", "0") == "0"
    with suppress(AttributeError, ValueError):  # there is no stderr, or it is closed
        return first and wish != "0" and (asked or sys.stderr.isatty() or _in_notebook() or wish == "1")
    return False


def _in_notebook() -> bool:
    """Whether this process is a notebook's. Others have `ipykernel` too, such as those that start notebooks."""
    app = sys.modules.get("ipykernel.kernelapp")
    return app is not None and app.IPKernelApp.initialized()


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Owner = TypeVar("_Owner", bound=_Named)


def named(operation: Callable[Concatenate[_Owner, _P], _T]) -> Callable[Concatenate[_Owner, _P], _T]:
    """The operation of an object as a stage of the object's name."""

    @wraps(operation)
    def run(owner: _Owner, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with progress.stage(owner.name, parts=1):
            return operation(owner, *args, **kwargs)

    return run


progress = Progress()
"""The one of this process; every `LM` has it too, as `lm.progress`."""
