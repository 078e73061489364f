"""Commands whose standard error is a pipe say how far they are, whatever takes long in them.

A pass of the model takes a second by the clock that lines are timed with, so that nothing depends on the machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise

import pytest

from conftest import saved

pytestmark = pytest.mark.slow

SLOW = """
import sys
from reknow import display
from reknow.cli import app
from reknow.model.decoder import Decoder
from reknow.progress import _here

now, forward = 0.0, Decoder.forward
display.clock, display.REFRESH = (lambda: now), 3600.0  # no timer

def slowly(self, *args, **options):
    global now
    now += 1
    _here.listener.__self__.tick()
    return forward(self, *args, **options)

Decoder.forward = slowly
app(sys.argv[1:])
"""
EDIT = ["edit", "The mother tongue of {Danielle Darrieux} is", "English", "--layer", "1"]
COMMANDS = {
    "rome": [*EDIT, "--set", "covariance_tokens=9000"],
    "memit": [*EDIT[:3], "--method", "memit", "--set", "layers=0,1,2", "--set", "covariance_tokens=9000"],
    "ft-m": [*EDIT, "--method", "ft-m", "--set", "stop_loss=0"],
    "ice": [*EDIT[:3], "--method", "ice", "--set", "layers=0,1", "--set", "stop_loss=0"],
    "grace": [*EDIT, "--method", "grace", "--set", "stop_loss=0"],
    "kn": [*EDIT[:3], "--method", "kn", "--set", "threshold=0.01"],
    "wise": [*EDIT, "--method", "wise"],
    "trial edits": ["trace", "--layers"],
    "trace": ["trace", "--limit", "8", "--out", "trace"],
    "stats": ["stats", "--layers", "0,1", "--tokens", "30000"],
    "train": ["train", "mend", "--limit", "100", "--set", "steps=12", "--set", "validate_every=6"],
    "bench": ["bench", "--methods", "ft-m", "--set", "layer=1", "--limit", "2"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_line_every_five_seconds_says_how_far_it_is(name, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "REKNOW_PROGRESS": "1",
        "REKNOW_CACHE": str(tmp_path / "cache"),
    }
    run = subprocess.run(
        [sys.executable, "-c", SLOW, *COMMANDS[name], "--model", "demo:gpt2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if line.endswith(" so far)")]
    assert not set(run.stderr) & {chr(code) for code in range(32)} - {"\n"}, "no control codes"
    assert len(lines) >= 3, run.stderr
    times = [seconds(line) for line in lines]
    assert times[0] == 2 and {later - sooner for sooner, later in pairwise(times)} == {5}
    open_by_then = [line for line in lines if ": opening" not in line]
    counted = [line for line in open_by_then if re.search(r", [\d,]+ of [\d,]+", line)]
    assert len(counted) >= 0.75 * len(open_by_then), run.stderr
    assert any(" left" in line for line in lines), run.stderr


def seconds(line: str) -> int:
    """The time so far that a line tells."""
    found = re.search(r"\((?:(\d+):)?(\d+) (?:s|min) so far\)$", line)
    assert found is not None, line
    return 60 * int(found[1] or 0) + int(found[2])


def test_nothing_is_said_of_quick_work(tmp_path):
    command = [sys.executable, "-c", SLOW, "show", "--model", saved(tmp_path)]
    run = subprocess.run(
        command, env=os.environ | {"REKNOW_PROGRESS": "1"}, capture_output=True, text=True, check=False
    )
    assert "so far" not in run.stderr
