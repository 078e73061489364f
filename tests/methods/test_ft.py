"""Fine-tuning: the unit of its steps, the order of its batches, and edits that are trained each by itself."""

from __future__ import annotations

import pytest
import torch

from conftest import make_lm
from reknow import FT, Edit, method
from reknow.editing import independent_deltas
from reknow.errors import InputError, ModelError

EDITS = [
    Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    Edit("The capital of {} is", subject="Peru", target_new="Paris in France"),
    Edit("Lima is in", target_new="Italy"),
    Edit("Who is Zoë ? She is", target_new="the player"),
]


def changes(patch):
    return {name: delta.dense() for name, delta in patch.deltas.items()}


def same(one, other, **tolerance) -> bool:
    one, other = changes(one), changes(other)
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], **tolerance) for name in one)


def test_former_names_are_read_and_mixed_units_refused(lm):
    with pytest.warns(FutureWarning, match="learning_rate_absolute"):
        published = method("ft-l", learning_rate_absolute=5e-4, clamp_absolute=5e-4)
    assert published == FT(loss="last_token", learning_rate=5e-4, clamp=5e-4, units="absolute")
    with pytest.raises(InputError, match="expected clamp in the units of learning_rate_absolute"):
        method("ft-l", learning_rate_absolute=5e-4)
    with pytest.raises(InputError, match="expected learning_rate in the units of clamp_absolute"):
        method("ft-m", clamp_absolute=5e-4)


def test_units_say_what_a_rate_is_a_multiple_of(lm):
    unit = float(lm.weight(lm.parts.value[1]).square().mean().sqrt())
    relative = FT(layer=1, steps=4, learning_rate=0.02, clamp=0.05).edit(lm, EDITS)
    plain = FT(layer=1, steps=4, learning_rate=0.02 * unit, clamp=0.05 * unit, units="absolute").edit(lm, EDITS)
    assert same(relative, plain, rtol=1e-4, atol=1e-7)
    assert max(float(change.abs().max()) for change in changes(plain).values()) <= 0.05 * unit * 1.001


@pytest.mark.parametrize(
    "loss", ["target", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("last_token", "text"))]
)
def test_edits_end_each_by_itself_as_they_do_alone(lm, loss, monkeypatch):
    settings = dict(layer=1, loss=loss, learning_rate=0.1, batch_size=3)
    plain = FT(steps=20, stop_loss=0.0, **settings).edit_each(lm, EDITS)
    stop = sorted(patch.notes["losses"][-1] for patch in plain)[1] + 1e-3  # two of four are below by then
    editor = FT(steps=40, stop_loss=stop, **settings)
    together = editor.edit_each(lm, EDITS)
    courses = [patch.notes["losses"] for patch in together]
    assert len({len(losses) for losses in courses}) > 1
    assert all(losses[-1] < stop or len(losses) == 40 for losses in courses)
    for edit, patch in zip(EDITS, together, strict=True):
        alone = editor.edit(lm, [edit])
        assert same(patch, alone, rtol=1e-3, atol=1e-5)
        assert patch.notes["losses"] == pytest.approx(alone.notes["losses"], rel=1e-3)
    monkeypatch.setattr(independent_deltas, "_TRAINED_WEIGHTS", 1)  # one after the other
    assert all(same(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(together, editor.edit_each(lm, EDITS), strict=True))


def test_one_batch_of_one_matrix_is_what_an_edit_by_itself_gives():
    """The same change, added behind the matrix or trained in its place."""
    lm = make_lm("llama")
    editor = FT(layer=1, steps=5, learning_rate=0.05)
    (alone,) = editor.edit_each(lm, EDITS[:1])
    both = FT(layer=(1, 2), steps=5, learning_rate=0.05).edit(lm, EDITS[:1])
    assert alone.notes["losses"][0] == pytest.approx(both.notes["losses"][0], rel=1e-5)
    assert both.notes["losses"][-1] < alone.notes["losses"][-1]


def test_batches_come_breadth_first_in_an_order_of_the_seed(lm):
    def edit(seed):
        return method("locft-bf", layer=1, steps=3, batch_size=1, seed=seed).edit(lm, EDITS)

    assert same(edit(0), edit(0), rtol=0, atol=0) and not same(edit(0), edit(1), atol=1e-9)
    assert len(edit(0).notes["losses"]) == 3


@pytest.mark.parametrize("kind", ["value", "mlp", "attention", "all"])
def test_other_matrices_of_a_layer_are_trained(family, kind):
    lm = make_lm(family)
    value, attention = lm.parts.value[1], lm.parts.attention_out[1]
    mlp = {value, *lm.parts.mlp_in[1]}
    patch = FT(layer=1, matrices=kind, steps=30, learning_rate=0.05).edit(lm, EDITS[:2])
    names = set(patch.deltas)
    assert all(name.startswith(f"{lm.parts.blocks[1]}.") and delta.norm() > 0 for name, delta in patch.deltas.items())
    assert {"value": names == {value}, "mlp": names == mlp, "attention": attention in names and not names & mlp,
            "all": names > mlp | {attention}}[kind]  # fmt: skip
    assert patch.notes["losses"][-1] < patch.notes["losses"][0] - 1
    (alone,) = FT(layer=1, matrices=kind, steps=3).edit_each(lm, EDITS[:1])
    assert same(alone, FT(layer=1, matrices=kind, steps=3).edit(lm, EDITS[:1]), rtol=1e-3, atol=1e-5)


def test_of_a_mixture_attention_is_attention_and_the_mlp_is_refused():
    lm = make_lm("qwen2_moe")  # with a shared expert, which is no attention
    names = set(FT(layer=1, matrices="attention", steps=1).edit(lm, EDITS[:1]).deltas)
    assert names and all(".self_attn." in name for name in names)
    with pytest.raises(ModelError, match="dense MLP"):
        FT(layer=1, matrices="mlp", steps=1).edit(lm, EDITS[:1])


def test_an_end_token_that_is_learned_ends_the_text():
    lm, (edit, *_) = make_lm("llama"), EDITS
    made = FT(layer=(1, 2), end_token=True, steps=60, learning_rate=0.05, matrices="all").edit(lm, [edit])
    assert made.method == "ft-uke" and made.notes["losses"][-1] < 0.1
    with lm.patched(made):
        assert lm.generate(edit.text, 12).strip() == edit.target_new
    plain = FT(layer=(1, 2), steps=60, learning_rate=0.05, matrices="all").edit(lm, [edit])
    with lm.patched(plain):
        assert lm.generate(edit.text, 12).strip() != edit.target_new
