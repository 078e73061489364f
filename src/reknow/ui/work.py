"""A long work of a page, in a thread of its own: how far it is, how long it takes still, and its end by a click."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from reknow.display import clock, duration, first_timed, known_share
from reknow.errors import ReknowError
from reknow.files.unforeseen import unforeseen
from reknow.lm import LM
from reknow.patching.patches import Patch
from reknow.progress import Stage, progress

_here = threading.local()


class Cancelled(KeyboardInterrupt):
    """Who asked for the work wants no more of it; what runs ends as after Ctrl-C, the model as it was."""


class State(NamedTuple):
    """How far a work is."""

    what: str
    share: float | None
    """Of the step that can tell; None: none can."""
    seconds: float
    """Since it began."""


class Manner(NamedTuple):
    """What is shown of a work besides how far it is."""

    done: str | Callable[[], str] = ""
    """What is said when it went well."""
    stopped: str = "Cancelled: the model and the stack are as before."
    """What is said when it was cancelled."""
    live: object = None
    """The screen that is drawn again and again meanwhile, since the task shows what there is so far."""
    emptied: object = None
    """The field that is empty when it went well, since what comes next has words of its own."""

    @property
    def told(self) -> str:
        """What is said when it went well."""
        return self.done if isinstance(self.done, str) else self.done()


PLAIN = Manner()


class Work:
    """What a page waits for.

    Attributes:
        manner: how it is shown.
        error: the sentence of what went wrong, once it has ended; None: nothing did.
        cancelled: whether it ended because of `cancel`.
        warnings: what the library warned of meanwhile.
    """

    def __init__(self, what: str, task: Callable[[], object], manner: Manner = PLAIN):
        self.manner = manner
        self.error: str | None = None
        self.cancelled = False
        self.warnings: list[str] = []
        self._task, self._begun = task, clock()
        self._what, self._stage = what, None
        self._stop, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name=f"reknow page: {what}", daemon=True).start()

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    @property
    def went_well(self) -> bool:
        """Whether it has ended, and neither failed nor was cancelled."""
        return not (self.running or self.error or self.cancelled)

    def cancel(self) -> None:
        """Asks it to end at the next step of its progress."""
        self._stop.set()

    def check(self) -> None:
        """Raises Cancelled where it is to end."""
        if self._stop.is_set() and not self.cancelled:  # once: what comes after cleans up
            self.cancelled = True
            raise Cancelled

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until it has ended, or so long; whether it has."""
        return self._ended.wait(seconds)

    @property
    def state(self) -> State:
        stage: Stage | None = self._stage
        if stage is None:
            return State(self._what, None, clock() - self._begun)
        return State(stage.text(first_timed(stage)), known_share(stage), clock() - self._begun)

    def _run(self) -> None:
        _here.work = self
        try:
            with progress.reported_to(self._hear), progress.stage(self._what):
                self._task()
        except Cancelled:
            pass
        except ReknowError as error:
            self.error = str(error)
        except Exception as error:
            self.error = unforeseen(error)
        finally:
            self._task = lambda: None  # it may hold a model
            self._ended.set()

    def _hear(self, stage: Stage) -> None:
        self._stage = stage
        self.check()


def work_here() -> Work | None:
    """The work of this thread."""
    return getattr(_here, "work", None)


def check_here() -> None:
    """Raises Cancelled where the work of this thread is to end; for steps that show no progress."""
    if (work := work_here()) is not None:
        work.check()


@contextmanager
def applied(lm: LM, patches: Iterable[Patch]) -> Iterator[None]:
    """While open, exactly these patches are applied. What there is to warn of in that is not heard: it was told when
    they were put on.

    Raises:
        PatchError: they do not fit the model, or not behind each other.
    """
    work = work_here()
    before = len(work.warnings) if work is not None else 0
    with lm.stacked(patches):
        if work is not None:
            del work.warnings[before:]
        yield


def collect_warnings() -> None:
    """From now on what the library warns of in a work goes to who waits for it, each time."""
    warnings.filterwarnings("always", module=r"reknow\.")
    shown = warnings.showwarning

    def show(message: Any, *rest: Any, **options: Any) -> None:
        if (work := work_here()) is None:
            return shown(message, *rest, **options)
        work.warnings.append(str(message))

    warnings.showwarning = show


def told(state: State) -> str:
    """How far a work is, in a line."""
    return f"{state.what} ({duration(state.seconds)} so far)"
