"""The models of the page, opened when they are asked for; one work at a time has the machine."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from reknow.lm import LM
from reknow.progress import progress

_LOOK = 0.2
"""Seconds between two looks whether it is a work's turn, or whether it is to end."""


class Models:
    """Opens models and keeps the last ones.

    Args:
        open_model: gives the model of that name.
        most: how many are kept in memory.
    """

    def __init__(self, open_model: Callable[[str], LM], most: int = 2):
        self._open, self._most = open_model, most
        self._opened: dict[str, LM] = {}
        self._waiting, self._changed = deque[object](), threading.Condition()

    @contextmanager
    def using(self, name: str) -> Iterator[LM]:
        """While open, the caller's work alone runs on any model; those who came before it go first.

        Raises:
            InputError, ModelError: there is no such model, or it is of a kind that is not handled.
        """
        with self._turn():
            if name not in self._opened:
                while len(self._opened) >= self._most:
                    del self._opened[next(iter(self._opened))]
                self._opened[name] = self._open(name)
            self._opened[name] = self._opened.pop(name)  # the last used goes last
            yield self._opened[name]

    @contextmanager
    def _turn(self) -> Iterator[None]:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
        try:
            if self._waiting[0] is not ticket:
                with progress.stage("waiting for the work of another page") as advance, self._changed:
                    while self._waiting[0] is not ticket:
                        self._changed.wait(_LOOK)
                        advance()
            yield
        finally:
            with self._changed:
                self._waiting.remove(ticket)
                self._changed.notify_all()
