"""Benchmarks name functions of the library to time them: these must be there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


def test_the_functions_that_are_timed_are_there(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed_work

    found = speed_work._by_phase(lambda: None, time.process_time)
    assert set(found) == {"all", *speed_work.PHASES, "other"}


def test_calibration_counts_both_sides(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scope

    table = scope.calibration([0.9, 0.6, 0.2], [0.1, 0.5])
    assert table[9] == {"threshold": 0.5, "in_scope": pytest.approx(2 / 3), "out_of_scope": 1.0}
    assert [row["threshold"] for row in table] == sorted(row["threshold"] for row in table) and len(table) == 19
