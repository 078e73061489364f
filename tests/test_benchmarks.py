"""Benchmarks name functions of the library to time them: these must be there."""

from __future__ import annotations

import json
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


@pytest.mark.slow
def test_rows_of_real_models_are_made_once(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import real_models

    out, common = str(tmp_path / "out"), ["--sets", "counterfact", "--layer", "0"]
    asked = ["real_models.py", "demo:gpt2", "--out", out, *common, "--facts", "1-2", "--methods"]
    monkeypatch.setattr("sys.argv", [*asked, "rome,ft-m-paper:gpt2-xl"])
    real_models.main()
    made = (tmp_path / "out/rows.jsonl").read_text()
    rows = [json.loads(line) for line in made.splitlines()]
    assert [row["method"] for row in rows] == ["unedited"] * 2 + ["rome"] * 2 + ["ft-m-paper:gpt2-xl"] * 2
    assert [row["metrics"]["reliability@teacher_forced_exact"] for row in rows[:4]] == [0, 0, 1, 1]
    assert all(row["metrics"]["norm"] > 0 for row in rows[2:])
    monkeypatch.setattr(real_models, "attempt_each", None)  # nothing is left to be edited, whatever it is called
    monkeypatch.setattr("sys.argv", [*asked, "again=rome"])
    real_models.main()
    assert (tmp_path / "out/rows.jsonl").read_text() == made
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["real_models.py", "--out", out, "--facts", "1-1"])
    real_models.main()
    assert [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[4:]] == [
        ["| unedited", "1"],
        ["| rome", "1"],
        ["| ft-m-paper:gpt2-xl", "1"],
    ]
