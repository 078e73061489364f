"""`score` writes the run folder of a model that somebody else edited, which `report` reads."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from conftest import make_lm, save, saved
from reknow.cli import app

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def edited(tmp_path_factory) -> str:
    lm, folder = make_lm("llama"), tmp_path_factory.mktemp("edited")
    lm.weight(lm.parts.value[1]).mul_(3)
    return save(lm, folder)


def run(*words: str):
    return CliRunner().invoke(app, [*words])


def test_a_run_folder_that_report_reads(base, edited, empty_folder):
    words = ["score", edited, "--base", base, "--data", "counterfact,zsre", "--limit", "2", "--out", "run"]
    first = run(*words, "--no-generate")
    assert first.exit_code == 0, first.output
    assert "== counterfact" in first.stdout and "after all edits" in first.stdout
    rows = [json.loads(line) for line in (empty_folder / "run/zsre/cases.jsonl").read_text().splitlines()]
    label = edited.rpartition("/")[2]
    assert {(row["method"], row["mode"], row["stage"]) for row in rows} == {(label, "batch", "end")} and len(
        rows
    ) == 2
    assert run(*words, "--no-generate").stdout == first.stdout
    assert len((empty_folder / "run/zsre/cases.jsonl").read_text().splitlines()) == 2
    again = run("report", "run/zsre")
    page = (empty_folder / "run/zsre/report.md").read_text(encoding="utf-8")
    assert again.exit_code == 0 and f"Edited elsewhere: {label}: {edited} (content " in page
    other = run(*words)
    assert other.exit_code == 2 and "generate is True and was False" in other.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "EDITED"], "expected an edited model and its base; got"),
        (["--base", "BASE", "--data", "counterfakt"], "Did you mean 'counterfact'"),
        (["--base", "BASE", "--out", "EDITED"], "is read from: choose another name"),
        (["--base", "BASE", "--out", "BASE"], "is read from: choose another name"),
        ([], "--base"),
    ],
)
def test_bad_input_is_one_sentence(words, said, base, edited):
    places = {"BASE": base, "EDITED": edited}
    result = run("score", edited, *(places.get(word, word) for word in words))
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.stderr
