"""Many facts, traced by shards: the averages are those of one process."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from reknow.cli import app

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("empty_folder")]


def trace(*more: str):
    line = ["trace", "--facts", "known_1000", "--limit", "30", "--classes", "--samples", "2", "--json", *more]
    return CliRunner().invoke(app, line)


def test_shards_of_traces_have_the_averages_of_one_process(empty_folder):
    whole = trace("--out", "whole")
    assert whole.exit_code == 0, whole.output
    first, second = (trace("--out", "parts", "--shard", f"{number}/2") for number in (2, 1))
    assert first.stdout.startswith("part 2 of 2 is whole: "), first.output
    assert second.exit_code == 0 and not (empty_folder / "parts/traces.jsonl").exists()
    assert not list((empty_folder / "parts").glob("*.png")), "pictures are of all"
    shown = trace("--out", "parts")
    assert json.loads(shown.stdout) == json.loads(whole.stdout)
    assert (empty_folder / "parts/average.png").exists()
    assert len((empty_folder / "parts/traces.jsonl").read_text("utf-8").splitlines()) == 1, "nothing twice"
    refused = trace("--out", "parts", "--shard", "1/2", "--force")
    assert refused.exit_code == 2 and "--force" in refused.stderr
    refused = CliRunner().invoke(app, ["trace", "{Peru} is in", "--workers", "2"])
    assert refused.exit_code == 2 and "--workers" in refused.stderr
