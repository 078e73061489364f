"""Several runs on one page: the cases of all, what differs besides, and differences case by case."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reknow.cli.app import app
from reknow.errors import InputError
from reknow.report.comparison import (
    compared_entries,
    differing,
    gaps_to_first,
    on_common_cases,
    write_comparison,
)
from reknow.report.verdict import make_verdict
from synthetic_runs import make_results, write_run

RIGHT = [1] * 9 + [0]


def cut(results, numbers):
    """The run of some of the cases."""
    names = {f"set/{number}" for number in numbers}
    before = {key: row for key, row in results.before.items() if row["case"] in names}
    rows = {key: row for key, row in results.rows.items() if row["case"] in names}
    return replace(results, before=before, rows=rows)


def test_only_cases_of_all_runs_count():
    one = make_results({"rome": (RIGHT, [1] * 10)})
    two = cut(make_results({"rome": ([1] * 10, [1] * 10)}), range(4, 10))
    runs = on_common_cases({"one": one, "two": two})
    assert [len(run.before) for run in runs.values()] == [6, 6]
    entries = compared_entries(runs)
    assert [entry.label for entry in entries] == ["unedited", "one: rome", "two: rome"]
    (gap,) = gaps_to_first(entries, "generated")
    new, kept = (difference for _, difference in gap.differences)
    assert new.mean == pytest.approx(1 / 6) and new.cases == gap.cases == 6 and new.p == 1.0 and kept.mean == 0.0
    assert differing({"one": one, "two": two}, runs) == [
        "Answers are over the 6 cases that the runs have in common: one has 10, two has 6. What is measured once is "
        "of the whole run.",
        "two: This run is not finished: 6 of 10 cases have been read to the end.",
    ]


def test_cases_are_the_same_where_their_requests_are():
    one = make_results({"rome": (RIGHT, [1] * 10)})
    other = make_results({"rome": (RIGHT, [1] * 10)}, target="Bonn")
    with pytest.raises(InputError, match="expected runs that have cases in common; got none among one 10, other 10"):
        on_common_cases({"one": one, "other": other})


def test_what_differs_besides_is_said(tmp_path):
    one = make_results({"rome": (RIGHT, [1] * 10)})
    two = make_results({"rome": ([1] * 10, [1] * 10), "ft": (RIGHT, RIGHT)}, seeds=[0, 1], model="another")
    for row in two.rows.values():
        for found in row["readings"]:
            found["text"] = None
    page = write_comparison({"one": one, "two <b>": two}, tmp_path).read_text()
    assert "two &lt;b&gt;: ft" in page and "two <b>" not in page
    assert "The models differ" in page and "The seeds differ: one: 0; two &lt;b&gt;: 0, 1" in page
    assert "read by different protocols" in page
    assert 'value="teacher_forced_exact"' in page and 'value="generated"' not in page, "what both have been read by"
    markdown = (tmp_path / "comparison.md").read_text()
    assert "| two <b>: ft | +0.0 [+0.0, +0.0], p = 1 | -10.0 [-30.0, +0.0], p = 1 | 10 |" in markdown
    for results in (one, two):
        for row in results.rows.values():
            row["readings"] = []
    with pytest.raises(InputError, match="read by one protocol at least"):
        write_comparison({"one": one, "two": two}, tmp_path)


def test_side_effects_on_other_texts_have_no_best(tmp_path):
    one, two, three = (
        make_results({name: (RIGHT, [1] * 10)}, held_out=[text])
        for name, text in (("rome", "Lima."), ("ft", "Lima."), ("grace", "Oslo."))
    )
    for number, results in enumerate((one, two, three)):
        for row in results.rows.values():
            row |= {"held_out_perplexity": 21.0 + number, "held_out_kl": 0.1 + number, "weight_change": 0.1 + number}

    def named(*runs) -> dict:
        return {f"run {number}": run for number, run in enumerate(runs)}

    def marked(*runs) -> list[str]:
        verdict = make_verdict(compared_entries(named(*runs)), "generated")
        cells = zip(*(line.cells for line in verdict.lines), strict=True)
        pairs = zip(verdict.columns, cells, strict=True)
        return [column.name for column, each in pairs if any(cell and cell.mark for cell in each)]

    assert marked(one, two) == ["perplexity", "drift", "weights moved"]
    assert marked(one, three) == ["weights moved"]
    page = write_comparison(named(one, three), tmp_path).read_text()
    assert "The held-out texts differ, so perplexity and drift cannot be compared" in page


def test_studies_of_several_sets_are_compared_set_by_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for study in ("first", "second"):
        for data in ("zsre", "own"):
            write_run(Path(study, data), make_results({"rome": (RIGHT, [1] * 10)}, name=data))
    refused = CliRunner().invoke(app, ["report", "first", "second"])
    assert refused.exit_code == 2 and "of a study of several sets one, as STUDY/SET" in refused.output
    assert "first/zsre 10" in refused.output and not Path("runs").exists()
    result = CliRunner().invoke(app, ["report", "first/zsre", "second/zsre"])
    assert result.exit_code == 0, result.output
    assert "second/zsre: rome" in Path("runs/comparison/comparison.md").read_text()


def test_the_command_compares_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/one"), make_results({"rome": (RIGHT, [1] * 10)}))
    write_run(Path("runs/two"), make_results({"ft-m": ([1] * 10, RIGHT)}))
    write_run(Path("more/two"), make_results({"grace": ([1] * 10, RIGHT)}))
    for _ in range(2):
        result = CliRunner().invoke(app, ["report", "runs/one", "runs/two", "more/two"])
        assert result.exit_code == 0, result.output
    assert "comparison: runs/comparison/comparison.html" in result.output
    assert "more/two: grace" in Path("runs/comparison/comparison.md").read_text()
    for words, said in (
        (["runs/one", "runs/one"], "expected different runs"),
        (["runs/one", "runs"], "expected different runs"),
        (["runs/one", "nowhere"], "expected a run folder"),
        (["runs/one", "runs/two", "--out", "runs/one"], "is read from"),
    ):
        result = CliRunner().invoke(app, ["report", *words])
        assert result.exit_code == 2 and said in result.output, result.output
    Path("mine").mkdir()
    Path("mine/comparison.md").write_text("years of work")
    result = CliRunner().invoke(app, ["report", "runs/one", "runs/two", "--out", "mine"])
    assert result.exit_code == 2 and "from elsewhere" in result.output
