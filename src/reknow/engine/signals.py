"""SIGTERM told from Ctrl-C, where a library makes a plain KeyboardInterrupt of both."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from reknow.errors import Terminated

__all__ = ["Terminations"]


class Terminations:
    """Keeps the handler of SIGTERM that was there, whatever others set, and notes when it is called."""

    def __init__(self):
        self._before: Any = None
        self._came = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While open, others may set a handler; afterwards it is the former one."""
        main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM) if main and self._before is None else None
        try:
            yield
        finally:
            if handler is not None:
                self._before = handler
                signal.signal(signal.SIGTERM, handler if handler is signal.SIG_IGN else self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._came = True
        if callable(self._before):
            self._before(number, frame)
        raise Terminated

    @contextmanager
    def told(self) -> Iterator[None]:
        """While open, the interrupt that SIGTERM brings is `Terminated`."""
        try:
            yield
        except KeyboardInterrupt as stop:
            if self._came and not isinstance(stop, Terminated):
                raise Terminated from None
            raise

    def restore(self) -> None:
        """Puts the handler back that was there in the beginning."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
