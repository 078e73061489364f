"""The main job on a bundled model, and the commands of docs/cli.md as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture
def shell(tmp_path):
    """Runs a shell line in an empty folder where `reknow` is this checkout's."""
    program = tmp_path / "bin" / "reknow"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "from reknow.cli import main; main()" "$@"\n')
    program.chmod(0o755)
    here = tmp_path / "here"
    here.mkdir()
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src")}

    def run(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(line, shell=True, cwd=here, env=environment, capture_output=True, text=True)

    run.folder = here
    return run


def test_the_demo_measures_reports_and_takes_back(shell):
    result = shell("reknow demo --quick --out run")
    assert result.returncode == 0, result.stderr
    assert "tensors have the bits they had before" in result.stdout
    assert "\n\nEdwin of Northumbria" in result.stdout, "a blank line between the tables"
    rows = [json.loads(line) for line in (shell.folder / "run" / "cases.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"rome", "ft-m"} and all(row["error"] is None for row in rows)
    page = (shell.folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and (shell.folder / "run" / "figure_reliability.png").stat().st_size
    assert shell("reknow demo --quick --out run").returncode == 0
    assert len((shell.folder / "run" / "cases.jsonl").read_text().splitlines()) == len(rows)


def test_the_commands_of_the_page_run(shell):
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), re.DOTALL)
    commands = re.findall(r"^\$ (.*)\n?((?:(?!\$ ).*\n)*)", "".join(blocks), re.MULTILINE)
    assert len(commands) > 20
    for command, output in commands:
        result = shell(command)
        status = 2 if output.startswith("error:") else int(bool(re.search(r", [1-9]\d* bad$", output, re.MULTILINE)))
        assert result.returncode == status, command + result.stderr
