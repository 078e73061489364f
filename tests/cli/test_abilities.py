"""`--ability` of bench: measured before and after, printed, reported; refused where it would cost a pass per case."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from conftest import saved
from reknow.cli import app

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("empty_folder")


def run(*words: str):
    return CliRunner().invoke(app, [*words])


@pytest.mark.slow
def test_a_task_before_and_after_is_in_the_same_report(tmp_path, empty_folder):
    words = ["bench", "--methods", "ft-m", "--limit", "2", "--no-side-effects", "--no-oracle", "--no-generate"]
    words += ["--model", saved(tmp_path / "model", "llama"), "--set", "ft-m.layer=1", "--set", "ft-m.steps=2"]
    single = run(*words, "--ability", "cloze", "--out", "single")
    assert single.exit_code == 2 and "2 times for each method: add --mode batch" in single.stderr
    unknown = run(*words, "--mode", "batch", "--ability", "clozed", "--out", "run")
    assert unknown.exit_code == 2 and "unknown task 'clozed'" in unknown.stderr
    assert not (empty_folder / "run").exists(), "refused before anything is run"
    found = run(*words, "--mode", "batch", "--ability", "cloze", "--out", "run")
    assert found.exit_code == 0 and "Abilities, tasks of lm-evaluation-harness" in found.stdout, found.output
    assert (empty_folder / "run" / "report.csv").read_text().count(",ability,") == 2
    shared = run(*words, "--mode", "batch", "--ability", "cloze", "--shard", "1/2", "--out", "run")
    assert shared.exit_code == 2 and "without --shard" in shared.stderr
