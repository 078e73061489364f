"""In-Context Editing: its equations, its fields, and that the model is left as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from conftest import make_lm
from families import CORE_FAMILIES, slow_but
from reknow import FT, ICE, Patch, method
from reknow.cli.measuring import methods_by_label
from reknow.editing import self_distillation
from reknow.editing.self_distillation import prepend_context
from reknow.errors import EditFailed, InputError
from reknow.model.scoring import kl_divergence
from reknow.model.tokens import Text
from reknow.studies.ice.convergence import consistency, most_likely_tokens
from reknow.studies.presets import PRESETS

FAST = dict(layers=(1, 2), learning_rate=0.03, steps=12, clamp=None)


@pytest.mark.parametrize("family", slow_but(("llama",), CORE_FAMILIES))
@pytest.mark.parametrize("settings", [{}, {"variant": "code"}, {"targets": "static"}, {"sample_target": False}])
def test_the_answer_becomes_likelier_and_the_model_is_left_alone(family, settings, edit):
    lm = make_lm(family)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    first = lm.score([edit.text], ["English"])[0].nll
    patch = ICE(**FAST | settings).edit(lm, [edit])
    assert all(torch.equal(before[name], p) for name, p in lm.model.named_parameters())
    with lm.patched(patch):
        assert lm.score([edit.text], ["English"])[0].nll < first - 1


def test_the_first_loss_is_algorithm_1(lm, edit, monkeypatch):
    drawn = (7, 8, 9)
    monkeypatch.setattr(self_distillation, "sample", lambda *args, **options: [drawn])
    notes = ICE(layers=(1,), steps=1, consistency_weight=0.5).edit(lm, [edit]).notes
    (row,) = lm.encode([Text(edit.text, "English")])
    ids = torch.tensor([[*row.ids, *drawn]])
    with torch.no_grad():
        all_nll = (
            -lm.model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[row.prompt_length - 1 :, 0]
        )
    answer, rest = all_nll[:-3].sum(), all_nll[-3:].sum()
    assert notes["losses"][0] == pytest.approx(float(answer + 0.5 * rest) / len(all_nll), rel=1e-4)
    assert notes["target_losses"][0] == pytest.approx(float(answer) / len(all_nll), rel=1e-4)


def test_pure_consistency_samples_behind_the_question(lm, edit, monkeypatch):
    seen = []

    def fixed(_lm, rows, count, **_):
        seen.extend(rows)
        return [(5,) * count for _ in rows]

    monkeypatch.setattr(self_distillation, "sample", fixed)
    settings = dict(sample_target=False, target_weight=0.0, context_introductions=("Fact: ",), sample_tokens=2)
    notes = ICE(layers=(1,), steps=1, **settings).edit(lm, [edit]).notes
    question = lm.encode([prepend_context(edit, edit.statement, "Fact: ")])[0]
    assert seen[0].ids == question.ids[: question.prompt_length]
    (row,) = lm.encode([Text(edit.text, "English")])
    ids = torch.tensor([[*row.ids[: row.prompt_length], 5, 5]])
    with torch.no_grad():
        log_probs = lm.model(ids).logits[0].log_softmax(-1)
    wanted = -(log_probs[-3, 5] + log_probs[-2, 5]) / (len(row.target_ids) + 2)
    assert notes["losses"][0] == pytest.approx(float(wanted), rel=1e-4)
    assert notes["target_losses"][0] == 0


def test_without_consistency_it_is_fine_tuning_of_the_same_layers(lm, edit):
    ours = ICE(**FAST, consistency_weight=0.0).edit(lm, [edit])
    theirs = FT(layer=(1, 2), steps=12, learning_rate=0.03).edit(lm, [edit])
    assert ours.notes["losses"] == pytest.approx(theirs.notes["losses"], rel=1e-4)
    for name, delta in ours.deltas.items():
        assert torch.allclose(delta.dense(), theirs.deltas[name].dense(), atol=1e-4)


def test_the_articles_fine_tuning_has_the_layers_the_rate_and_the_bound(monkeypatch, edit):
    """The presets' rows, of six layers five."""
    monkeypatch.setattr("reknow.editing.layers.suggest_layer", lambda lm: 3)
    lm = make_lm("gpt2", n_layer=6)
    for preset in (PRESETS["ice-table"], PRESETS["ice-continual"]):
        chosen = methods_by_label(preset.methods, [])
        fast = {label: replace(chosen[label], steps=4) for label in ("ft-m@article", "ft-l@article", "ft-m")}
        wanted = ICE(steps=4, consistency_weight=0.0).edit(lm, [edit])
        found = {label: method.edit(lm, [edit]) for label, method in fast.items()}
        assert list(wanted.deltas) == list(found["ft-l@article"].deltas) == [lm.parts.value[i] for i in range(1, 6)]
        for name, delta in wanted.deltas.items():
            bound = 0.12 * float(lm.base_weight(name).square().mean().sqrt())
            assert torch.allclose(delta.dense(), found["ft-m@article"].deltas[name].dense(), atol=1e-5)
            assert float(found["ft-l@article"].deltas[name].dense().abs().max()) <= bound * 1.001
        assert list(found["ft-m"].deltas) == [lm.parts.value[3]]


def test_static_targets_come_from_the_model_before_the_edit(lm, edit, monkeypatch):
    """Dynamic samples meet replaced matrices, static ones the model's own."""
    module, calls = lm.model.get_submodule(lm.parts.value[1]), []
    monkeypatch.setattr(
        self_distillation, "sample", lambda *args, **options: calls.append("forward" in vars(module)) or [(3, 4, 5)]
    )
    for targets in ("static", "dynamic"):
        ICE(layers=(1,), steps=2, targets=targets).edit(lm, [edit])
    assert calls == [False, False, True, True]


def test_samples_are_drawn_as_often_as_asked(lm, edit, monkeypatch):
    calls = []
    monkeypatch.setattr(
        self_distillation, "sample", lambda _lm, rows, count, **_: calls.append(len(rows)) or [(3,)] * len(rows)
    )
    many = replace(edit, context=("One fact.", "Another."))
    ICE(layers=(1,), steps=5, sample_every=2, samples=3, sample_tokens=1).edit(lm, [many, edit])
    assert calls == [9, 9, 9]  # (2 contexts + 1 statement) · 3 samples, in steps 0, 2 and 4


def test_a_reused_sample_gives_the_same_steps_with_the_lower_blocks_reused(lm, edit, monkeypatch):
    monkeypatch.setattr(self_distillation, "sample", lambda _lm, rows, count, **_: [(3, 4, 5)] * len(rows))
    each = ICE(layers=(1,), steps=4).edit(lm, [edit])
    once = ICE(layers=(1,), steps=4, sample_every=4).edit(lm, [edit])
    assert each.notes["losses"] == pytest.approx(once.notes["losses"], rel=1e-5)


@pytest.mark.parametrize("settings", [{"clamp": 0.01}, {"clamp": 1e-3, "learning_rate": 7e-4, "units": "absolute"}])
def test_no_weight_moves_farther_than_the_bound(lm, edit, settings):
    patch = ICE(**FAST | settings).edit(lm, [edit])
    for name, delta in patch.deltas.items():
        bound = settings["clamp"]
        if "units" not in settings:
            bound *= float(lm.weight(name).square().mean().sqrt())
        assert float(delta.dense().abs().max()) == pytest.approx(bound, rel=1e-3)


def test_the_same_seed_gives_the_same_patch_and_leaves_the_random_state(lm, edit):
    state = torch.get_rng_state()
    patches = [ICE(**FAST, seed=seed).edit(lm, [edit]) for seed in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    assert patches[0].id == patches[1].id != patches[2].id


def test_notes_are_kept_with_the_patch(lm, edit, tmp_path):
    patch = ICE(**FAST).edit(lm, [edit])
    notes = Patch.load(patch.save(tmp_path / "ice.patch")).notes
    assert len(notes["losses"]) == len(notes["repetitions"]) == 12
    assert notes == json.loads(json.dumps(patch.notes))
    steps = zip(notes["losses"], notes["target_losses"], notes["consistency_losses"], strict=True)
    assert all(whole == pytest.approx(a + b) for whole, a, b in steps)


def test_repetitions_count_what_was_there_before(lm, edit, monkeypatch):
    (row,) = lm.encode([Text(edit.text, "English")])
    first = row.target_ids[0]
    fresh = next(token for token in range(100) if token not in row.target_ids)
    monkeypatch.setattr(self_distillation, "sample", lambda *args, **options: [(first, fresh, fresh)])
    assert ICE(layers=(1,), steps=1).edit(lm, [edit]).notes["repetitions"] == [2]


def test_consistency_is_the_divergence_between_both_sides(lm, edit):
    (value,) = consistency(lm, [edit], introductions=("Fact: ",))
    sides = []
    for text in (prepend_context(edit, edit.statement, "Fact: "), Text(edit.text, "English")):
        (row,) = lm.encode([text])
        with torch.no_grad():
            sides.append(lm.model(torch.tensor([row.ids])).logits[0, row.prompt_length - 1 :].log_softmax(-1))
    wanted = torch.nn.functional.kl_div(sides[1], sides[0], log_target=True, reduction="none").sum(-1).mean()
    assert value == pytest.approx(float(wanted), rel=1e-4)
    assert float(kl_divergence(sides[0], sides[0]).abs().max()) < 1e-6


def test_the_code_variant_brings_both_sides_together(lm, edit, monkeypatch):
    monkeypatch.setattr(self_distillation, "sample", lambda *args, **options: [(7, 8, 9)])
    notes = ICE(**FAST, variant="code", context_introductions=("Fact: ",)).edit(lm, [edit]).notes
    assert notes["consistency_losses"][-1] < 0.7 * notes["consistency_losses"][0]


def test_top_tokens_are_read_at_the_place_behind_the_answer(lm, edit):
    found = most_likely_tokens(lm, edit, "Some fact.", count=3)
    (row,) = lm.encode([Text(edit.text, "English")])
    with torch.no_grad():
        top = lm.model(torch.tensor([row.ids])).logits[0, -1].topk(3).indices
    assert found["without"] == [lm.tokenizer.decode(token) for token in top]


@pytest.mark.parametrize(
    "settings",
    [
        {"consistency_weight": -1.0},
        {"consistency_weight": float("nan")},
        {"consistency_weight": float("inf")},
        {"consistency_weight": 0.0, "target_weight": 0.0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"samples": 0},
        {"sample_every": 0},
        {"context_introductions": ()},
        {"targets": "frozen"},
        {"variant": "code", "with_context": False},
        {"variant": "script"},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError, match="got"):
        method("ice", **settings)


def test_a_missing_context_and_too_long_a_text_are_refused(lm, edit):
    with pytest.raises(InputError, match="expected a context"):
        ICE(contexts="given").edit(lm, [edit])
    limit = lm.model.config.max_position_embeddings
    long = replace(edit, context=("very " * limit,))
    with pytest.raises(InputError, match=f"at most {limit} tokens"):
        ICE(layers=(1,)).edit(lm, [long])
    with pytest.raises(InputError, match="at least one layer"):
        ICE(layers=()).edit(lm, [edit])
    with pytest.raises(EditFailed, match="learning_rate"):
        ICE(layers=(1,), learning_rate=1e38, clamp=None).edit(lm, [edit])


@pytest.mark.parametrize("name", ["learning_rate", "clamp"])
def test_a_rate_or_bound_below_nothing_is_refused(lm, edit, name):
    with pytest.raises(InputError, match=f"expected {name} above 0; got -1.0"):
        ICE(layers=(1,), **{name: -1.0}).edit(lm, [edit])


def test_former_names_of_rate_and_bound_are_read_together_and_refused_in_mixed_units():
    with pytest.warns(FutureWarning, match="learning_rate_absolute"):
        published = method("ice", learning_rate_absolute=7e-4, clamp_absolute=5e-4, link=" ", track=True)
    assert published == ICE(learning_rate=7e-4, clamp=5e-4, units="absolute", context_separator=" ")
    assert method("ice", clamp=0.2, learning_rate_absolute=None, clamp_absolute=None) == ICE(clamp=0.2)
    with pytest.raises(InputError, match=r"expected clamp in the units of learning_rate_absolute; got 0\.12"):
        method("ice", learning_rate_absolute=7e-4)


def test_a_line_break_stands_before_the_question_and_now_as_published(edit):
    assert prepend_context(edit, edit.statement, "Fact: ").prompt == f"Fact: {edit.statement}\n{edit.text}"
    assert ICE().context_separator == "\n" and ICE.paper("gpt2-xl").context_separator == " Now: "
