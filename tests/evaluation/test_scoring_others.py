"""`score`: a model that somebody else edited, beside its base."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest

from conftest import make_lm
from reknow import FT, LM, Case, Edit, Probe
from reknow.errors import InputError
from reknow.evaluation import Plan, Results, bench, score
from reknow.evaluation.run_folder import BEFORE_FILE, ROWS_FILE

METHOD = FT(layer=2, steps=40, learning_rate=0.17)
CASES = [
    Case(
        Edit("The capital of {} is", subject=subject, target_new=new, target_true="Lima"),
        (
            Probe(f"Where is {subject} ? It is in", (new,), "generalization", "paraphrase"),
            Probe("The mother tongue of Danielle is", ("Lima",), "locality", "neighborhood"),
        ),
    )
    for subject, new in (("Peru", "Paris ."), ("France", "Apple ."), ("Apple", "Zoë ."))
]


def edited(family: str = "gpt2") -> LM:
    """A model with the cases' edits in its weights, and no trace of a patch."""
    lm = make_lm(family)
    patch = METHOD.edit(lm, [case.edit for case in CASES])
    for name, delta in patch.deltas.items():
        lm.weight(name).add_(delta.dense().to(lm.weight(name)))
    return lm


def lines(folder: Path, name: str = ROWS_FILE) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def test_the_scores_are_those_of_a_bench_whose_patch_makes_that_model(family, tmp_path):
    measured = bench(make_lm(family), CASES, {"other": METHOD}, tmp_path / "bench", plan=Plan("batch"))
    results = score(lambda: edited(family), lambda: make_lm(family), CASES, tmp_path / "score", label="other")
    assert str(Results.load(tmp_path / "score")) == str(results)
    costs = {"seconds", "peak_memory_mb", "steps", "loss", "stored_kb"}
    found = {(c.method, c.stage, c.protocol, c.metric): c.mean for c in results.cells.values()}
    wanted = {
        (c.method, c.stage, c.protocol, c.metric): c.mean for c in measured.cells.values() if c.metric not in costs
    }
    assert found.keys() == wanted.keys() and len(found) > 10
    assert all(value == pytest.approx(wanted[key], abs=1e-4) for key, value in found.items())
    assert found["other", "end", "teacher_forced_exact", "reliability"] == 1


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_one_model_is_in_memory_at_a_time(tmp_path):
    alive, folder, whole = [], tmp_path / "run", tmp_path / "whole"
    made = edited()
    weights = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    del made

    def opened(given: bool, last: int = 9) -> LM:
        assert not any(model() is not None for model in alive), "the one before is gone"
        if len(alive) == last:
            raise KeyboardInterrupt
        lm = make_lm()
        if given:
            lm.model.load_state_dict(weights)
        alive.append(weakref.ref(lm.model))
        return lm

    def run(place: Path, last: int = 9) -> Results:
        alive.clear()
        return score(lambda: opened(True, last), lambda: opened(False), CASES, place, label="other")

    with pytest.raises(KeyboardInterrupt):
        run(folder, last=2)
    kept = (folder / BEFORE_FILE).read_bytes()
    assert len(lines(folder, BEFORE_FILE)) == len(CASES) and not (folder / ROWS_FILE).exists()
    run(folder)
    assert len(alive) == 3 and (folder / BEFORE_FILE).read_bytes() == kept
    rows = (folder / ROWS_FILE).read_bytes()
    (folder / ROWS_FILE).write_bytes(rows[: len(rows) // 2])  # a line torn in the middle
    run(folder)
    run(whole)
    assert lines(folder) == lines(whole) and (folder / BEFORE_FILE).read_bytes() == kept


def test_a_case_that_cannot_be_read_counts_as_failed(tmp_path):
    long = Case(Edit("word " * 300 + "{} is", subject="Peru", target_new="Paris"))
    results = score(edited, make_lm, [*CASES, long], tmp_path, label="other")
    assert list(results.failed) == ["other"] and len(results.failed["other"]) == 1


def test_other_tokenizers_and_another_content_of_the_place_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected the tokenizer of the base"):
        score(lambda: edited("llama"), make_lm, CASES, tmp_path / "a", label="other")
    score(edited, make_lm, CASES, tmp_path / "b", label="other")

    def changed() -> LM:
        lm = edited()
        lm.model.transformer.ln_f.bias.data[0] += 1
        return lm

    with pytest.raises(InputError, match=r"expected the settings with which .* methods\.other\.content is"):
        score(changed, make_lm, CASES, tmp_path / "b", label="other")
