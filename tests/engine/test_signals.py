"""SIGTERM stays SIGTERM where a library makes a plain KeyboardInterrupt of it."""

from __future__ import annotations

import os
import signal
import time

import pytest

from reknow.engine.signals import Terminations
from reknow.errors import Terminated


@pytest.mark.parametrize("handler", [signal.SIG_DFL, lambda *_: None])
def test_a_termination_is_told_from_an_interrupt_and_the_handler_comes_back(handler):
    first = signal.signal(signal.SIGTERM, handler)
    try:
        terminations = Terminations()
        with pytest.raises(KeyboardInterrupt) as stopped, terminations.told():
            raise KeyboardInterrupt
        assert stopped.type is KeyboardInterrupt
        with terminations.kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a library does
        with pytest.raises(Terminated), terminations.told():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            except Terminated:
                raise KeyboardInterrupt from None
        terminations.restore()
        assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, first)
