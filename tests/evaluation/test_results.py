"""Results for other programs: data frames and LaTeX."""

from __future__ import annotations

import sys

import pytest

from reknow.errors import MissingExtra
from synthetic_runs import make_results


@pytest.fixture
def results():
    return make_results({"rome": ([1, 1, 0], [1, 1, 1]), "ft_m": ([1, 0, 0], [1, 1, 0])}, together=3)


def test_a_frame_has_a_row_per_number(results):
    pytest.importorskip("pandas")
    frame = results.frame()
    assert list(frame.columns) == ["method", "stage", "metric", "protocol", "mean", "low", "high", "n", "together"]
    assert len(frame) == len(results.cells)
    row = frame.query("method == 'rome' and metric == 'reliability' and protocol == 'generated'").iloc[0]
    cell = results.cells["rome", "after_edit", "reliability@generated"]
    assert (row["mean"], row["low"], row["high"], row["n"]) == (cell.mean, cell.low, cell.high, 3)
    seconds = frame.query("method == 'rome' and metric == 'seconds'").iloc[0]
    assert seconds["together"] == 3 and seconds[["low", "high"]].isna().all(), "one measurement has no interval"


def test_a_frame_by_case_gives_the_means(results):
    pytest.importorskip("pandas")
    frame = results.frame(by_case=True)
    assert list(frame.columns) == ["method", "stage", "case", "metric", "protocol", "value"]
    assert not frame.duplicated(["method", "stage", "case", "metric", "protocol"]).any()
    means = frame.groupby(["method", "stage", "metric", "protocol"])["value"].mean()
    assert means["ft_m", "after_edit", "locality", "generated"] == pytest.approx(2 / 3)


def test_without_pandas_it_says_what_to_install(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"pip install 'reknow\[frame\]'"):
        results.frame()


def test_latex_has_every_table(results):
    text = results.to_latex()
    assert text.startswith("% \\usepackage{booktabs}\n") and text.count(r"\begin{table}") == len(results.tables())
    assert r"ft\_m & right after the edit & 3 & " in text and "0.50 (mean of 3 made together)" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}")
