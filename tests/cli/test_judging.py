"""`judge` asks a real server, and its verdicts are in the report."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from llm_server import verdict
from reknow.cli import app

pytest.importorskip("openai")
pytestmark = pytest.mark.usefixtures("empty_folder")


def run(*words: str):
    return CliRunner().invoke(app, [*words])


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    out = tmp_path_factory.mktemp("benched") / "run"
    words = ["bench", "--methods", "ft-m", "--limit", "2", "--no-side-effects", "--out", str(out)]
    assert run(*words).exit_code == 0
    return out


@pytest.fixture
def made(benched, empty_folder):
    return shutil.copytree(benched, empty_folder / "run")


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT to another process is POSIX")
def test_ctrl_c_keeps_every_verdict_that_came_and_the_same_command_goes_on(made, serve):
    asked: list[str] = []

    def slow(question: str) -> str:
        asked.append(question)
        time.sleep(0.1)
        return verdict(question)

    server = serve(slow)
    words = ["judge", "run", "--judge", "writer", "--judge-url", f"http://127.0.0.1:{server.http.server_port}/v1"]
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from reknow.__main__ import main; main()"  # a job in the background ignores it
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-c", program, *words, "--at-once", "2"]
    with subprocess.Popen(line, cwd=made.parent, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while len(asked) < 5:
            assert process.poll() is None and not time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=50)
    assert process.returncode == 130, said
    kept = (made / "judged.jsonl").read_text().splitlines()
    assert 5 <= len(kept) == len(asked) < 18, "what was under way is there too"
    again = run(*words)
    assert again.exit_code == 0 and f"18 of 18 texts judged by writer, {18 - len(kept)} of them now" in again.stdout
    assert len(asked) == 18 and len(set(asked)) == 18, "no question is paid twice"


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
