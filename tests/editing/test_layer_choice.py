"""The layer that is edited where none is named: what is kept of trial edits, or a guess."""

from __future__ import annotations

import json
import logging

import pytest

from conftest import make_lm
from reknow import LM, ROME, Edit
from reknow.editing import covariance, layer_choice, layer_trials, papers_layers
from reknow.editing.layer_choice import (
    BESIDE,
    FILE,
    LayerScore,
    best_score,
    is_guess,
    keep_scores,
    measured_layer,
    read_scores,
    suggest_layer,
    write_scores,
)
from reknow.errors import InputError
from reknow.files.cache import cache_folder
from reknow.methods import rome
from reknow.tracing import causal

SCORES = [LayerScore(0, 0.1, 1, 0.5, 1), LayerScore(1, 0.2, 1, 1, 1), LayerScore(2, 0.3, 1, 1, 1)]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path / "cache"))


def test_the_best_is_chosen_and_the_effect_breaks_ties():
    assert best_score(SCORES).layer == 2
    assert best_score(SCORES[:1]).layer == 0


def test_a_model_that_was_not_measured_gets_the_depth_of_the_papers_at_once(monkeypatch, caplog):
    monkeypatch.setattr(layer_trials, "try_layers", lambda *_: pytest.fail("no trial edits are made unasked"))
    caplog.set_level(logging.INFO)
    lm = make_lm("gpt2", n_layer=7)
    monkeypatch.setattr(lm, "forward", lambda *_: pytest.fail("nothing is read"))
    assert measured_layer(lm) is None and suggest_layer(lm) == 1
    assert "a guess by depth" in caplog.text and not cache_folder().exists()
    assert is_guess(lm)
    for place in (papers_layers, layer_choice):
        monkeypatch.setattr(place, "published_layers", lambda *_: [5])
    other = make_lm("gpt2", n_layer=7)
    assert suggest_layer(other) == 5 and not is_guess(other)


def test_what_was_measured_is_kept_for_the_same_weights_only():
    lm = make_lm()
    before = suggest_layer(lm)
    keep_scores(lm, SCORES)
    assert [suggest_layer(lm), suggest_layer(make_lm())] == [2, 2]
    assert suggest_layer(make_lm(seed=1)) == before
    keep_scores(make_lm(seed=1), SCORES[:1])
    keep_scores(lm, SCORES[:2])  # a later measurement replaces the former
    kept = json.loads((cache_folder() / FILE).read_text())
    assert [entry["layer"] for entry in kept.values()] == [0, 1] and len(kept) == 2
    assert list(kept.values())[1]["trials"][1]["reliability"] == 1
    (cache_folder() / FILE).write_text("{broken")
    assert suggest_layer(make_lm()) == before


def test_what_former_versions_kept_is_read():
    """They put a hash of the trials' settings behind the model's."""
    lm = make_lm()
    keep_scores(lm, SCORES)
    file, digest = cache_folder() / FILE, lm.fingerprint.digest
    (entry,) = json.loads(file.read_text()).values()
    file.write_text(json.dumps({f"{digest}-5b302cda": {**entry, "layer": 1}, "x-1": {**entry, "layer": 0}}))
    assert measured_layer(make_lm()) == 1
    file.write_text(json.dumps({f"{digest}-5b302cda": {**entry, "layer": 1, "trials": []}, "x-1": entry}))
    assert measured_layer(make_lm()) is None  # a guess
    keep_scores(lm, SCORES)
    assert set(json.loads(file.read_text())) == {digest, "x-1"}


def test_a_layer_that_the_model_does_not_have_is_not_taken():
    lm = make_lm()
    keep_scores(lm, [LayerScore(99, 0.0, 1, 1, 1)])
    assert measured_layer(make_lm()) is None


def test_a_file_hands_it_on(tmp_path):
    file = tmp_path / "shared.json"
    write_scores(make_lm(), SCORES, file)
    assert read_scores(make_lm(), file) == SCORES
    with pytest.raises(InputError, match=r"expected trial edits of .* by fingerprints it has"):
        read_scores(make_lm(seed=1), file)
    for text in (
        "",
        "{}",
        "[]",
        json.dumps({make_lm().fingerprint.digest: {"layer": 1, "model": "m", "trials": []}}),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match="make them with reknow layers --out"):
            read_scores(make_lm(), file)
    with pytest.raises(InputError, match="make them with"):
        read_scores(make_lm(), tmp_path / "nowhere.json")


def test_it_may_lie_beside_the_weights(tmp_path):
    lm = make_lm("gpt2")
    folder = tmp_path / "model"
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    before = suggest_layer(LM(str(folder)))
    write_scores(LM(str(folder)), SCORES, folder / BESIDE)
    assert suggest_layer(LM(str(folder))) == 2 != before
    keep_scores(LM(str(folder)), SCORES[:1])  # what was measured here comes first
    assert suggest_layer(LM(str(folder))) == 0


def test_a_first_edit_with_nothing_kept_does_what_it_needs_and_no_more(monkeypatch):
    """One pass over enough text for one layer, one search; no trial edits, nothing written."""
    lm = make_lm("llama")
    monkeypatch.setattr(layer_trials, "try_layers", lambda *_: pytest.fail("no trial edits are made unasked"))
    monkeypatch.setattr(causal, "known_facts", lambda *_: pytest.fail("no facts are asked for"))
    read, own_sums = [], covariance.sum_keys
    monkeypatch.setattr(covariance, "sum_keys", lambda task: read.append(task) or own_sums(task))
    searched, own_search = [], rome.find_values
    monkeypatch.setattr(rome, "find_values", lambda *args: searched.append(args) or own_search(*args))
    written, own_generate = [], lm.generate
    monkeypatch.setattr(lm, "generate", lambda *args, **more: written.append(args) or own_generate(*args, **more))
    passes, own_forward = [], lm.forward
    monkeypatch.setattr(lm, "forward", lambda ids, *a, **b: passes.append(ids) or own_forward(ids, *a, **b))
    edit = Edit("I know {}", subject="Danielle Darrieux", target_new="of")
    method = ROME(steps=3)
    method.edit(lm, [edit])
    (task,), tokens = read, 20 * lm.weight(lm.parts.value[0]).shape[1]
    assert (task.names, task.tokens) == ([lm.parts.value[suggest_layer(lm)]], tokens)
    assert len(searched) == 1 and not written  # contexts are beginnings of the same text
    assert sum(ids.numel() for ids in passes) < 3 * tokens  # with padding, contexts and lower blocks
    count = len(passes)
    method.edit(lm, [edit])
    assert len(read) == 1 and not written and len(passes) - count < 5
