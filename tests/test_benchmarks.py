"""Benchmarks name functions of the library to time them: these must be there."""

from __future__ import annotations

import time
from pathlib import Path


def test_the_functions_that_are_timed_are_there(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import speed_work

    found = speed_work._by_phase(lambda: None, time.process_time)
    assert set(found) == {"all", *speed_work.PHASES, "other"}
