"""The search for δ: its loss, when it ends, and that facts in one batch know nothing of each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import AuthorsSearch, make_lm
from reknow import LM, PMET, load_cases, method
from reknow.editing import value_batch
from reknow.editing.value_batch import Scores
from reknow.editing.values import Convergence, decrease_per_pass, find_values, turn, value_loss
from reknow.edits import Edit
from reknow.errors import EditRefused, InputError
from reknow.model.replay import BlockReplay
from reknow.model.tokens import Text

EDITS = [
    Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English", target_true="French"),
    Edit("{} is a city in", subject="Lima", target_new="Italy", target_true="Peru"),
    Edit("The famous player {}", subject="Toko Yasuda", target_new="piano", target_true="guitar"),
]
CONTEXTS = ("", "The city. ", "I saw. ")


@pytest.fixture(scope="module")
def gpt2():
    return make_lm("gpt2")


def test_facts_in_one_batch_are_searched_as_if_alone(gpt2):
    search = AuthorsSearch(steps=8, site="block")
    together = find_values(gpt2, EDITS, 1, CONTEXTS, search)
    for i, edit in enumerate(EDITS):
        alone = find_values(gpt2, [edit], 1, CONTEXTS, search)
        assert torch.allclose(together.z[i], alone.z[0], atol=1e-4)
        assert together.losses[i] == pytest.approx(alone.losses[0], rel=1e-4)


def test_more_facts_than_fit_are_searched_in_several_batches(gpt2, monkeypatch):
    search = AuthorsSearch(steps=6, site="block")
    whole = find_values(gpt2, EDITS, 0, CONTEXTS, search)
    monkeypatch.setattr(value_batch, "TOKENS_PER_BATCH", 1)
    parts = find_values(gpt2, EDITS, 0, CONTEXTS, search)
    assert torch.allclose(whole.z, parts.z, atol=1e-4)
    assert torch.allclose(whole.mean_key, parts.mean_key, atol=1e-5)


@pytest.mark.parametrize("name", ["rome", "emmet", "memit", "memit-fe", "pmet", "alphaedit"])
def test_a_place_that_no_answer_sees_is_refused(gpt2, name):
    """What the last layer adds behind a subject only the next token sees."""
    place = {"layer": 2} if name in ("rome", "emmet") else {"layers": [2]}
    editor = method(name, **place, steps=2, context_groups=(), covariance_tokens=60)
    language, _, player = EDITS
    with pytest.raises(EditRefused, match="got layer 2 for 'The mother tongue of Danielle Darrieux is'") as refused:
        editor.edit(gpt2, [player, language])
    assert gpt2.layers == 3 and refused.value.edit is language
    assert editor.edit(gpt2, [player]).deltas


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (dict(steps=1), "expected steps of at least 2"),
        (
            dict(layers=[1], context_variance=1.0, variance_layers=2),
            "variance_layers of at most 1, .* above layer 1; got 2",
        ),
        (dict(layers=[2], context_variance=1.0), "variance_layers of at most 0"),
    ],
)
def test_settings_by_which_nothing_is_searched_or_counted_are_refused(gpt2, settings, wanted):
    quick = dict(layers=[0], steps=2, context_groups=((3, 2),), covariance_tokens=60)
    with pytest.raises(InputError, match=wanted):
        method("memit", **quick | settings).edit(gpt2, EDITS[2:])


def test_the_loss_is_the_equation():
    search = AuthorsSearch(kl_weight=0.5, weight_decay=2.0, context_variance=4.0)
    edited, unedited = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    scores = Scores(torch.tensor([3.0]), edited, torch.tensor([0.1]), torch.tensor([False]), torch.tensor([0.3]))
    delta, sizes = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[10.0]])
    kl = float(0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log())
    for units, length in (("absolute", 5 / 100), ("relative", 5 / 10)):
        loss, drift = value_loss(delta, scores, unedited, sizes, torch.tensor([0.1]), replace(search, units=units))
        assert float(drift) == pytest.approx(0.5 * kl)
        assert float(loss) == pytest.approx(0.1 * 3 + 0.5 * kl + 2 * length + 4 * 0.3)


def passed(losses, predicted=None):
    """A pass of which only the losses matter, and which answers are predicted."""
    count = len(losses)
    predicted = torch.zeros(count, dtype=torch.bool) if predicted is None else torch.tensor(predicted)
    return torch.tensor(losses), torch.ones(count), torch.zeros(count), predicted


def test_a_fact_is_finished_when_every_batch_of_contexts_in_turn_satisfied_it():
    convergence = Convergence(torch.tensor([0, 1, 2]), 2, AuthorsSearch(stop_loss=1.0))
    convergence.record(*passed([0.5, 0.5, 2.0]))
    convergence.record(*passed([0.5, 2.0, 2.0]))
    assert convergence.running.tolist() == [False, True, True]
    convergence.record(*passed([9.0, 0.5, 2.0]))
    assert convergence.losses == [[0.5, 0.5], [0.5, 2.0, 0.5], [2.0, 2.0, 2.0]]


def test_finished_facts_are_no_longer_read_once_they_are_a_quarter():
    convergence = Convergence(torch.arange(5), 1, AuthorsSearch(stop_loss=1.0))
    convergence.record(*passed([2.0, 0.5, 2.0, 2.0, 2.0]))
    assert convergence.drop_finished() is None
    convergence.record(*passed([2.0, 2.0, 2.0, 0.5, 2.0]))
    assert convergence.drop_finished() == [0, 2, 4] == convergence.read.tolist()
    convergence.record(*passed([2.0, 0.5, 2.0]))
    assert convergence.drop_finished() == [0, 2] and convergence.read.tolist() == [0, 4]


def test_facts_of_one_addition_are_finished_together():
    convergence = Convergence(torch.tensor([0, 1, 0]), 1, AuthorsSearch(stop_loss=1.0))
    convergence.record(*passed([0.5, 0.5, 2.0]))
    assert convergence.running.tolist() == [True, False, True]


def test_a_likelihood_counts_less_while_the_answer_is_predicted():
    convergence = Convergence(torch.tensor([0, 1]), 1, replace(PMET(), stop_drift=0.5))
    convergence.record(*passed([2.0, 2.0], [True, False]))
    assert convergence.nll_weight.tolist() == pytest.approx([0.1, 1.0])
    assert convergence.running.tolist() == [True, True], "the drift is 1"


def test_finished_facts_stay_as_they_are(gpt2):
    plain = find_values(gpt2, EDITS, 1, CONTEXTS, AuthorsSearch(steps=12))
    stop = sorted(losses[5] for losses in plain.losses)[1] + 1e-3  # two of three are below by then
    search = AuthorsSearch(steps=12, stop_loss=stop)
    early = find_values(gpt2, EDITS, 1, CONTEXTS, search)
    assert len({len(losses) for losses in early.losses}) > 1
    for i, edit in enumerate(EDITS):
        alone = find_values(gpt2, [edit], 1, CONTEXTS, search)
        assert len(early.losses[i]) == len(alone.losses[0])
        assert torch.allclose(early.delta[i], alone.delta[0], atol=1e-4)


def test_batches_of_contexts_give_the_same_means_and_end_when_all_are_satisfied(gpt2):
    whole = find_values(gpt2, EDITS, 1, CONTEXTS, AuthorsSearch(steps=12))
    split = find_values(gpt2, EDITS, 1, CONTEXTS, AuthorsSearch(steps=12, context_batches=2))
    assert torch.allclose(split.mean_key, whole.mean_key, atol=1e-5)
    assert torch.allclose(split.key, whole.key, atol=1e-5)
    assert all(losses[-1] < losses[1] for losses in split.losses)  # both of the second batch
    loose = max(loss for losses in split.losses for loss in losses) + 1
    ended = find_values(gpt2, EDITS, 1, CONTEXTS, AuthorsSearch(steps=12, context_batches=2, stop_loss=loose))
    assert [len(losses) for losses in ended.losses] == [2, 2, 2]  # a pass for each batch


@pytest.mark.slow
def test_a_search_that_gains_little_ends_once_the_answer_is_the_most_likely():
    lm = LM.demo("gpt2")
    edits = [case.edit for case in load_cases("counterfact", limit=12)]
    plain = dict(
        steps=40,
        context_batches=2,
        learning_rate=0.1,
        units="relative",
        stop_probability=1.0,
        stop_loss=0.0,
        clamp=1.0,
    )

    def lengths(**stop):
        found = find_values(lm, edits, 0, CONTEXTS, AuthorsSearch(**plain, **stop, site="block"))
        return [len(losses) for losses in found.losses]

    hit = lengths(stop_drift=1e9)  # ended as soon as every context in turn has the answer
    assert min(hit) < 9 < max(hit)
    first = [max(passes, 9) for passes in hit]  # 8 passes show what one gains, both batches must have the answer then
    soon, later = lengths(min_delta=1e9), lengths(min_delta=0.02)
    assert all(a <= b <= c for a, b, c in zip(first, soon, later, strict=True))
    assert sum(a == b for a, b in zip(first, soon, strict=True)) > 9
    assert any(9 < passes < 40 for passes in later)


def test_what_a_pass_gains_is_read_off_whole_rounds_of_the_batches():
    falling = [10.0 - 0.5 * i + (3.0 if i % 3 == 0 else 0.0) for i in range(12)]  # one batch of three is harder
    assert decrease_per_pass(falling, 3) == pytest.approx(0.5)
    assert decrease_per_pass(falling[:11], 3) == torch.inf
    assert decrease_per_pass([1.0] * 8, 1) == 0


def test_a_context_that_comes_twice_counts_twice(gpt2):
    twice = find_values(gpt2, EDITS, 1, (*CONTEXTS, CONTEXTS[1]), AuthorsSearch(steps=2))
    once = [find_values(gpt2, EDITS, 1, (context,), AuthorsSearch(steps=2)).key for context in CONTEXTS]
    assert torch.allclose(twice.mean_key, (once[0] + 2 * once[1] + once[2]) / 4, atol=1e-5)


def test_merged_subjects_share_one_addition(gpt2):
    edits = [EDITS[0], EDITS[1], Edit("{} lives in", subject="Danielle Darrieux", target_new="Rome")]
    found = find_values(gpt2, edits, 1, CONTEXTS, AuthorsSearch(steps=6, merge_subjects=True))
    assert torch.equal(found.delta[0], found.delta[2])
    assert not torch.equal(found.delta[0], found.delta[1])
    apart = find_values(gpt2, edits, 1, CONTEXTS, AuthorsSearch(steps=6))
    assert not torch.equal(apart.delta[0], apart.delta[2])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "glm4", "granite"])
def test_behind_a_norm_a_wanted_value_is_as_long_as_the_value(family):
    """Only its direction counts there, as the same answers to twice of it show; a multiplier (Granite) is no norm."""
    lm = make_lm(family)
    search = AuthorsSearch(steps=6, units="relative", learning_rate=0.3, weight_decay=0)
    found = find_values(lm, EDITS, 1, CONTEXTS, search)
    ratio = (found.value + found.delta).norm(dim=1) / found.value.norm(dim=1)
    assert torch.allclose(ratio, torch.ones(3), atol=1e-4) == (family != "granite")
    absolute = find_values(lm, EDITS, 1, CONTEXTS, replace(search, units="absolute", learning_rate=0.1))
    assert float(((absolute.value + absolute.delta).norm(dim=1) / absolute.value.norm(dim=1) - 1).abs().max()) > 1e-3
    (row,) = lm.encode([Text.about(EDITS[0])])
    replay = BlockReplay(lm, lm.pad([row]), 1, row.subject_last)
    large = 100 * (found.value + found.delta)[:1]  # of the size of real models' values, beside which ε vanishes
    last = torch.tensor([0]), torch.tensor([row.prompt_length - 1])
    once, twice = (replay(factor * large - replay.value, *last) for factor in (1, 2))
    assert torch.allclose(once, twice, atol=1e-4 * float(once.std())) == (family != "granite")


def test_a_turned_value_keeps_its_length_and_its_direction_as_far_as_the_clamp_allows():
    generator = torch.Generator().manual_seed(0)
    value, delta = (torch.randn(7, 16, generator=generator) for _ in range(2))
    free, held = turn(value, delta, torch.full((7, 1), 99.0)), turn(value, delta, torch.full((7, 1), 0.5))
    for turned in (free, held):
        assert torch.allclose((value + turned).norm(dim=1), value.norm(dim=1), rtol=1e-5)
    assert torch.allclose(torch.cosine_similarity(value + free, value + delta), torch.ones(7), atol=1e-5)
    assert torch.allclose(held.norm(dim=1), torch.full((7,), 0.5), rtol=1e-4)
    plane = torch.linalg.lstsq(torch.stack([value, delta], 2), held[..., None])  # turned in the plane of v and δ
    assert torch.allclose(torch.stack([value, delta], 2) @ plane.solution, held[..., None], atol=1e-4)
    assert torch.allclose(turn(value, 0 * delta, torch.ones(7, 1)), 0 * value, atol=1e-5)


def test_a_model_without_a_norm_there_is_searched_as_before(gpt2):
    search = AuthorsSearch(steps=6, units="relative", learning_rate=0.1)
    found = find_values(gpt2, EDITS, 1, CONTEXTS, search)
    assert float(((found.value + found.delta).norm(dim=1) / found.value.norm(dim=1) - 1).abs().max()) > 1e-3
