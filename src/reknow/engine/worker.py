"""What a worker does in its own process: opens the model once, and does tasks of jobs."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Container, Generator
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from reknow.engine.jobs import Doer, Job
from reknow.lm import LM

__all__ = ["Worker"]


class Worker:
    """Has a model, and a folder of its own for what tasks keep: that of the run may be on another machine."""

    def __init__(self, open_lm: Callable[[], LM], threads: int):
        os.environ["REKNOW_PROGRESS"] = "0"
        torch.set_num_threads(threads)
        self._said: list[str] = []
        warnings.showwarning = lambda message, *_: self._said.append(str(message))
        self._open = open_lm
        self._doer: Doer | None = None
        self._folder = Path(tempfile.gettempdir()) / f"reknow-{uuid4().hex}"  # made when something is kept

    @cached_property
    def _lm(self) -> LM:
        return self._open()

    def ask(self, question: Callable[[LM], Any]) -> Any:
        """What a function says of the model."""
        return question(self._lm)

    def begin(self, job: Job | None) -> None:
        """Opens the model, and makes ready for the tasks of a job."""
        lm = self._lm
        self._doer = None if job is None else job.begin(lm, self._folder)

    def do(
        self, task: Any, there: Container[tuple], files: dict[str, bytes]
    ) -> Generator[tuple[str, Any], None, None]:
        """Pairs of a word and what it says: a `row`, a `file` (name and content), a `warning`."""
        assert self._doer is not None
        for name, content in files.items():
            place = self._folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        known = {*files}
        with closing(self._doer.do(task, there)) as rows:
            for row in rows:
                yield from self._new(task.place, known)  # first, so that what made the row is there if it is
                yield "row", row
        yield from self._new(task.place, known)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _new(self, place: str, known: set[str]) -> Generator[tuple[str, Any], None, None]:
        """Warnings, and files that were kept since; notes, which say that what they are about is whole, come last."""
        while self._said:
            yield "warning", self._said.pop(0)
        if not place:
            return
        paths = [path for path in (self._folder / place).rglob("*") if path.is_file()]
        for path in sorted(paths, key=lambda each: (each.suffix == ".json", each)):
            name = path.relative_to(self._folder)
            if name.as_posix() not in known and not any(part.startswith(".") for part in name.parts):
                known.add(name.as_posix())
                yield "file", (name.as_posix(), path.read_bytes())
