"""A work that is cut into tasks, and the engine that does them.

A task needs nothing but the model and the job, so that any process may do any of them. What is made of it is appended
to a file by one process alone, row by row, so that whoever is killed loses no row, and none is made twice.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, TypeVar

from reknow.lm import LM

__all__ = ["Doer", "Engine", "Job", "Local", "Task"]

_T = TypeVar("_T")


class Task(Protocol):
    """Some rows that one process makes in one go."""

    @property
    def place(self) -> str:
        """The folder, below that of the run, in which it keeps what it may need again; empty: it keeps nothing."""
        ...


class Doer(Protocol):
    """Does tasks with a model."""

    def do(self, task: Any, there: Container[tuple]) -> Generator[dict[str, Any], None, None]:
        """The rows of a task as JSON objects, as they are made, but for those whose keys are `there`."""
        ...


class Job(Protocol):
    """A work before it has a model. Other processes get copies."""

    def begin(self, lm: LM, folder: Path | None) -> Doer:
        """What does its tasks with this model, and keeps what it may need again in the folder."""
        ...

    def keys(self, task: Any) -> list[tuple]:
        """The keys of all rows of a task."""
        ...


class Engine(Protocol):
    """Does the tasks of a job."""

    def ask(self, question: Callable[[LM], _T]) -> _T:
        """What a function says of the model."""
        ...

    def perform(
        self,
        job: Job,
        tasks: Sequence[Task],
        there: Container[tuple],
        keep: Callable[[dict[str, Any]], object],
        folder: Path | None,
    ) -> None:
        """Does the tasks, and calls `keep` with each row as soon as it is made.

        Args:
            there: keys of rows that are kept already, those that `keep` adds among them.
            folder: where tasks find and keep what they may need again; None: nowhere.
        """
        ...


class Local:
    """Does one task after the other in this process.

    Args:
        source: a model, or what opens one when it is needed first.
    """

    def __init__(self, source: LM | Callable[[], LM]):
        self._source = source

    @property
    def lm(self) -> LM:
        if not isinstance(self._source, LM):
            self._source = self._source()
        return self._source

    def ask(self, question: Callable[[LM], _T]) -> _T:
        return question(self.lm)

    def perform(
        self,
        job: Job,
        tasks: Sequence[Task],
        there: Container[tuple],
        keep: Callable[[dict[str, Any]], object],
        folder: Path | None,
    ) -> None:
        doer = job.begin(self.lm, folder)
        for task in tasks:
            with closing(doer.do(task, there)) as rows:  # an error of `keep` ends what the task has opened at once
                for row in rows:
                    keep(row)
