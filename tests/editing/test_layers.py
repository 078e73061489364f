"""Which layer: candidates and trial edits; where papers edit."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch

import reknow.editing.covariance
from conftest import make_lm, without_weights
from reknow import FT, LM, ROME, Edit
from reknow.datasets import Fact, load_facts
from reknow.editing import layer_trials
from reknow.editing.covariance import cache_folder
from reknow.editing.layer_choice import LayerScore, best_score, keep_scores, measured_layer, suggest_layer
from reknow.editing.layer_trials import candidates, measure_layers, trial_relations, try_layers
from reknow.editing.layers import resolve_layer
from reknow.editing.papers_layers import band_around, papers_layers
from reknow.errors import InputError
from reknow.lm import Score

PARAPHRASES = ("{} was born in", "The birthplace of {} is")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path))


@pytest.fixture
def knowing(monkeypatch):
    """A tiny model that is taken to know everything, edited without statistics."""
    for module in ("editing.layer_trials", "tracing.causal"):
        monkeypatch.setattr(f"reknow.{module}.known_facts", lambda lm, facts: list(facts))
    monkeypatch.setattr(layer_trials, "ROME_SETTINGS", dict(steps=2, context_groups=((1, 2),), covariance_tokens=0))
    return make_lm("gpt2")


def relations(count: int) -> list[list[Fact]]:
    names, places = ("Zoë", "Peru", "Danielle", "Apple"), ("Lima", "Paris", "France", "Rome")
    return [
        [Fact(f"{number} {{}} is from", n, p, PARAPHRASES) for n, p in zip(names, places, strict=True)]
        for number in range(count)
    ]


def test_candidates_are_the_lower_two_thirds():
    assert [candidates([0.0] * n) for n in (1, 2, 3, 6, 9)] == [[], [0], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


def test_a_deep_model_gets_spaced_candidates_and_the_most_effective_layers():
    effects = [0.0] * 48
    effects[17], effects[18], effects[47] = 0.3, 0.2, 0.9  # the last lies in the upper third
    assert candidates(effects) == [0, 10, 17, 18, 21, 31]


def test_the_papers_layers_are_always_tried():
    effects = [0.0] * 48
    effects[17], effects[18], effects[30] = 0.3, 0.2, 0.1
    assert candidates(effects, [17, 8]) == [0, 8, 10, 17, 18, 21, 30, 31]
    assert candidates([0.0] * 6, [1]) == [0, 1, 2, 3]
    assert candidates([0.0] * 6, [4, 5]) == [0, 1, 2, 3, 4]


SHAPES = [
    ("gpt2", dict(n_layer=48, n_embd=1600, n_head=25), [17, 8], [13, 14, 15, 16, 17]),
    ("gpt2", dict(n_layer=36, n_embd=1280, n_head=20), [12, 6], [10, 11, 12, 13, 14]),
    ("gptj", dict(n_layer=28, n_embd=4096, n_head=16), [5, 5], [3, 4, 5, 6, 7, 8]),
    ("llama", dict(num_hidden_layers=32, hidden_size=4096), [5, 5], [4, 5, 6, 7, 8]),
    ("llama", dict(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336), [5, 5], [4, 5, 6, 7, 8]),
    ("qwen2", dict(num_hidden_layers=28, hidden_size=3584, intermediate_size=18944), [5, 5], [4, 5, 6, 7, 8]),
    ("mistral", dict(num_hidden_layers=32, hidden_size=4096), [5, 5], [4, 5, 6, 7, 8]),
    ("mistral", dict(num_hidden_layers=40, hidden_size=5120), [7], [5, 6, 7, 8, 9]),  # of no paper
]


@pytest.mark.parametrize(("kind", "shape", "wanted", "around"), SHAPES)
def test_models_that_papers_edited_are_known_by_their_shape(kind, shape, wanted, around):
    lm = without_weights(kind, **shape)
    assert papers_layers(lm) == wanted
    assert band_around(lm, wanted[0]) == around
    assert len(band_around(lm, 20)) == 5 and 20 in band_around(lm, 20)  # where no paper edited


def test_the_score_is_the_harmonic_mean():
    assert LayerScore(0, 0.0, 1.0, 0.5, 0.5).score == pytest.approx(0.6)
    assert LayerScore(0, 0.0, 1.0, 0.0, 1.0).score == 0


def test_trial_facts_stay_away_from_the_evaluation():
    evaluated = {fact.subject for fact in load_facts("counterfact")}
    found = [fact for relation in trial_relations() for fact in relation]
    assert len(found) > 150
    assert not evaluated & {fact.subject for fact in found}
    assert all(fact.paraphrases and "{}" in fact.paraphrases[0] for fact in found)
    assert all(fact.prompt not in fact.paraphrases for fact in found)


def test_trial_edits_alternate_between_the_relations():
    asked = relations(3)
    known = {fact for relation in asked for fact in relation if fact.subject != "Zoë"}
    edits = layer_trials._trial_edits(asked, known)
    assert [fact.prompt for fact, _, _ in edits][:4] == [r[0].prompt for r in (*asked, asked[0])]
    assert len(edits) == layer_trials.FACTS
    for fact, new, others in edits:
        assert fact.subject != "Zoë" and new != fact.answer
        assert others and all(f in known and f.subject != fact.subject and f.answer != new for f in others)


def test_trials_edit_at_every_candidate_and_leave_the_model_alone(knowing, monkeypatch):
    edited = []

    def score(self, prompts, answers):
        (patch,) = self.patches
        edited.append(patch.edits[0].subject)
        # The prompt itself and the first of two paraphrases are answered, and one of the three other subjects stays.
        right = [p == patch.edits[0].text or " was born in" in p or "Apple is from" in p for p in prompts]
        assert answers[: len(PARAPHRASES) + 1] == [patch.edits[0].target_new] * 3
        return [Score(0.0, (hit,), (), 1) for hit in right]

    monkeypatch.setattr(LM, "score", score)
    before = {name: p.clone() for name, p in knowing.model.named_parameters()}
    trials = try_layers(knowing, relations(5))
    assert [trial.layer for trial in trials] == candidates([0.0] * knowing.layers)
    # Relations alternate: five facts about Zoë, then three about Peru.
    assert edited == [*["Zoë"] * 5, *["Peru"] * 3] * len(trials)
    assert all((t.reliability, t.generalization, t.locality) == (1, 0.5, 0.5) for t in trials)
    assert len({trial.effect for trial in trials}) == len(trials)
    assert knowing.patches == ()
    assert all(torch.equal(p, before[name]) for name, p in knowing.model.named_parameters())


def test_the_choice_is_kept(knowing, monkeypatch):
    monkeypatch.setattr(layer_trials, "trial_relations", lambda: relations(5))
    trials = measure_layers(knowing)
    assert suggest_layer(knowing) == suggest_layer(make_lm("gpt2")) == best_score(trials).layer


def test_a_model_that_knows_nothing_gets_no_choice():
    lm = make_lm("gpt2", n_layer=7)
    assert measure_layers(lm) == [] and measured_layer(lm) is None
    assert not (cache_folder() / "layers.json").exists()


def test_candidates_share_one_pass_over_the_text(knowing, monkeypatch):
    monkeypatch.setitem(layer_trials.ROME_SETTINGS, "covariance_tokens", 300)
    read, own = [], reknow.editing.covariance.sum_keys
    monkeypatch.setattr(reknow.editing.covariance, "sum_keys", lambda task: read.append(task.names) or own(task))
    trials = try_layers(knowing, relations(5))
    assert read == [[knowing.parts.value[trial.layer] for trial in trials]]


def test_the_base_model_decides_whatever_is_applied(knowing, monkeypatch):
    seen = []
    monkeypatch.setattr(layer_trials, "trial_relations", lambda: relations(5))
    monkeypatch.setattr(
        layer_trials, "_score_layer", lambda lm, *_: seen.append(lm.patches) or LayerScore(1, 0.0, 1.0, 1.0, 1.0)
    )
    patch = FT(layer=0, steps=2).edit(knowing, [Edit("{} is", subject="Peru", target_new="Lima")])
    with knowing.patched(patch):
        assert [trial.layer for trial in try_layers(knowing)] == [1] * len(candidates([0.0] * knowing.layers))
        assert knowing.patches == (patch,)
    assert set(seen) == {()}


def test_methods_ask_for_the_layer(knowing, monkeypatch):
    edit = Edit("{} is", subject="Peru", target_new="Lima")
    keep_scores(knowing, [LayerScore(1, 0.0, 1.0, 1.0, 1.0)])
    chosen = suggest_layer(knowing)
    assert chosen == 1
    method = ROME(steps=2, context_groups=((1, 2),), covariance_tokens=0)
    assert method.edit(knowing, [edit]).notes["layer"] == chosen
    assert FT(steps=1).edit(knowing, [edit]).notes["layer"] == chosen


def test_a_layer_that_is_given_is_taken(lm):
    assert resolve_layer(lm, 2) == 2
    with pytest.raises(InputError, match="expected a layer from 0 to 2"):
        resolve_layer(lm, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_shipped_choice_is_what_trials_give(name):
    if not (files("reknow") / "assets" / "models" / name).is_dir():
        pytest.skip("this demo model is not bundled")
    lm = LM.demo(name)
    shipped = suggest_layer(lm)
    assert not (cache_folder() / "layers.json").exists()  # read, not measured
    trials = try_layers(lm)
    assert measured_layer(lm) == shipped == best_score(trials).layer
