"""`judge` asks a real server, and its verdicts are in the report."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from llm_server import verdict
from reknow.cli import app

pytest.importorskip("openai")
pytestmark = pytest.mark.usefixtures("empty_folder")


def run(*words: str):
    return CliRunner().invoke(app, [*words])


@pytest.fixture
def made(empty_folder):
    words = ["bench", "--methods", "ft-m", "--limit", "2", "--no-side-effects", "--out", "run"]
    assert run(*words).exit_code == 0
    return empty_folder / "run"


def test_verdicts_cost_and_agreement_are_printed_and_reported(made, serve):
    server = serve(verdict)
    words = ["judge", "run", "--judge", "writer", "--judge-url", f"http://127.0.0.1:{server.http.server_port}/v1"]
    first = run(*words, "--price", "0.5,2")
    assert first.exit_code == 0, first.output
    asked = len(server.asked)
    assert f"{asked} of {asked} texts judged by writer, {asked} of them now" in first.stdout
    assert f"{asked} of answers; 0." in first.stdout and "Cohen's kappa" in first.stdout
    contains = next(line for line in first.stdout.splitlines() if "contains" in line)
    assert "100.0%" in contains and "1.00" in contains
    again = run(*words)
    assert f"{asked} of {asked} texts judged by writer, 0 of them now" in again.stdout and len(server.asked) == asked
    assert run("report", "run").exit_code == 0
    assert "A model judges" in (made / "report.md").read_text() and ",judged," in (made / "report.csv").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none", "--judge", "m"], "expected a run folder"),
        (["run"], "--judge"),
        (["run", "--judge", "m", "--price", "1"], "expected --price IN,OUT"),
        (["run", "--judge", "m", "--price", "1,nan"], "expected --price IN,OUT"),
        (["run", "--judge", "m", "--judge-url", "http://127.0.0.1:9/v1"], "0 of 18 verdicts are in"),
    ],
)
def test_bad_input_is_one_sentence(made, words, said, monkeypatch):
    monkeypatch.setattr("reknow.files.llm.time.sleep", lambda seconds: None)
    result = run("judge", *words)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.stderr
