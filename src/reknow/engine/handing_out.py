"""Hands tasks out to workers that may die at any moment, and keeps what they make.

The workers give their rows as they make them; this process alone writes. A task whose worker died goes to another
one, without the rows that came already.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from reknow.engine.jobs import Job, Task
from reknow.errors import EngineError
from reknow.files.atomic import atomic_write

__all__ = ["Died", "Done", "Kept", "Made", "Ready", "Workers", "hand_out"]

_log = logging.getLogger(__name__)

MOST_DEATHS = 3
"""So many workers in a row that end without a row, over one task or before they are ready, end the work."""


@dataclass(frozen=True)
class Ready:
    """A worker waits for a task."""

    worker: int


@dataclass(frozen=True)
class Made:
    """A row."""

    worker: int
    row: dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """A file, relative to the folder of the run, that a task may need again."""

    worker: int
    name: str
    content: bytes


@dataclass(frozen=True)
class Done:
    """A task is done."""

    worker: int


@dataclass(frozen=True)
class Died:
    """A worker has ended, with its task if it had one."""

    worker: int
    reason: str


class Workers(Protocol):
    """Processes that have the model and the job."""

    def wait(self) -> Ready | Made | Kept | Done | Died:
        """What comes next; raises what a task raises."""
        ...

    def give(self, worker: int, task: Any, there: frozenset[tuple], files: dict[str, bytes]) -> None:
        """Has a worker do a task but for the rows that are there; `files` are those that were kept for it."""
        ...

    def restart(self, worker: int) -> None:
        """Starts a worker in the place of one that died."""
        ...


def hand_out(
    workers: Workers,
    job: Job,
    tasks: Sequence[Task],
    there: Container[tuple],
    keep: Callable[[dict[str, Any]], object],
    folder: Path | None,
) -> None:
    """Has the workers do the tasks; see `Engine.perform`.

    Raises:
        EngineError: worker after worker ends over one task, or before it is ready.
    """
    waiting = deque(task for task in tasks if not all(key in there for key in job.keys(task)))
    doing: dict[int, Task] = {}
    idle: list[int] = []
    deaths, unready = Counter[int](), 0  # by the identity of tasks
    while waiting or doing:
        while waiting and idle:
            worker, task = idle.pop(), waiting.popleft()
            known = frozenset(key for key in job.keys(task) if key in there)
            doing[worker] = task
            workers.give(worker, task, known, {} if folder is None else _files(folder, task))
        event = workers.wait()
        if isinstance(event, Ready):
            idle.append(event.worker)
            unready = 0
        elif isinstance(event, Made):
            keep(event.row)
            deaths[id(doing[event.worker])] = 0
        elif isinstance(event, Kept):
            if folder is not None:
                _write(folder / event.name, event.content)
        elif isinstance(event, Done):
            del doing[event.worker]
            idle.append(event.worker)
        else:
            task = doing.pop(event.worker, None)
            idle = [worker for worker in idle if worker != event.worker]
            if task is None:
                unready += 1
            else:
                deaths[id(task)] += 1
                waiting.appendleft(task)
            _check(task, deaths[id(task)] if task else unready, event.reason)
            workers.restart(event.worker)


def _check(task: Task | None, deaths: int, reason: str) -> None:
    """Says that a worker has ended; raises EngineError where too many have, one after the other."""
    what = "while it had no task" if task is None else f"over the task {task}"
    if deaths < MOST_DEATHS:
        _log.warning("a worker ended %s (%s); another one takes its place", what, reason)
        return
    raise EngineError(
        f"expected workers that last; {deaths} in a row ended {what}, the last one because: {reason}: give them more "
        "memory (fewer --workers), or leave out what they end over; the rows that were made are kept"
    )


def _files(folder: Path, task: Task) -> dict[str, bytes]:
    """The files that were kept for a task, by their names relative to the folder."""
    if not task.place:
        return {}
    found = (path for path in (folder / task.place).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(found)}


def _write(path: Path, content: bytes) -> None:
    atomic_write(path, lambda new: Path(new).write_bytes(content))
