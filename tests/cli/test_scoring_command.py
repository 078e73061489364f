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


@pytest.mark.slow
def test_a_run_folder_that_report_reads(base, edited, empty_folder):
    words = ["score", edited, "--base", base, "--data", "counterfact,zsre", "--limit", "2", "--out", "run"]
    first = run(*words, "--no-generate")
    assert first.exit_code == 0, first.output
    assert "== counterfact" in first.stdout and "after all edits" in first.stdout
    rows = [json.loads(line) for line in (empty_folder / "run/zsre/cases.jsonl").read_text().splitlines()]
    label = edited.rpartition("/")[2]
    places = [(row["method"], row["mode"], row["stage"]) for row in rows]
    assert places == [("unedited", "batch", "in_context")] * 2 + [(label, "batch", "end")] * 2
    assert rows[-1]["held_out_kl"] > 0 and rows[-1]["weight_change"] == pytest.approx(2, rel=1e-3)
    assert run(*words, "--no-generate").stdout == first.stdout
    assert len((empty_folder / "run/zsre/cases.jsonl").read_text().splitlines()) == 4
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


@pytest.mark.slow
def test_what_is_measured_besides_is_chosen_and_taken_up(base, edited, empty_folder):
    (empty_folder / "text.txt").write_text("Lima is in Peru .\n\nApple owns Beats Music .")
    words = ["score", edited, "--base", base, "--limit", "2", "--no-generate", "--out", "run"]
    first = run(*words, "--no-oracle", "--held-out", "text.txt")
    assert first.exit_code == 0 and "in front" not in first.stdout and "weight_change" in first.stdout, first.output
    settings = json.loads((empty_folder / "run/manifest.json").read_text())["settings"]
    assert settings["held_out"] == ["Lima is in Peru .", "Apple owns Beats Music ."]
    assert run(*words).stdout == first.stdout, "as the folder has it"
    other = run(*words, "--oracle", "--no-side-effects")
    assert other.exit_code == 2 and "held_out is [] and was" in other.stderr and "oracle is True" in other.stderr
    both = run(*words, "--no-side-effects", "--held-out", "text.txt")
    assert both.exit_code == 2 and "leave one out" in both.stderr and both.stderr.count("\n") == 1
    plain = run(*words[:-1], "plain", "--no-oracle", "--no-side-effects")
    assert plain.exit_code == 0 and "in front" not in plain.stdout and "perplexity" not in plain.stdout
