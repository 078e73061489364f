"""MEMOIR's masks, the stored one that is nearest, and its descent: the paper's equations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import make_lm
from reknow import MEMOIR, Edit, Patch
from reknow.errors import PatchError
from reknow.memories.residual_memory import ClippedDescent, ResidualMemory, TopHash, pack_masks, read_memory


def hashed(width: int = 6, kept: int = 2, background: float = 0.0) -> TopHash:
    return TopHash.of(torch.full((width,), background), kept, seed=0)


def test_a_mask_has_the_largest_inputs_of_the_prompts_mean_permuted():
    inputs = torch.tensor([[[5.0, 0, 0, -2, 0, 0], [1.0, 0, 0, -2, 0, 0], [0, 0, 9, 0, 9, 9]]])
    inside = torch.tensor([[True, True, False]])  # the last column is no prompt
    hash_ = hashed()
    mask = hash_.masks(inputs, inside)[0]
    assert mask.sum() == 2 and sorted(hash_.order[[0, 3]].tolist()) == mask.nonzero()[:, 0].tolist()
    assert sorted(hash_.order.tolist()) == list(range(6)) != hash_.order.tolist()


def test_what_all_prompts_have_is_taken_off():
    inputs = torch.tensor([[[9.0, 9.0, 9.1, 9.0, 8.8, 9.0]]])
    hash_ = hashed(background=9.0)
    mask = hash_.masks(inputs, torch.ones(1, 1, dtype=torch.bool))[0]
    assert sorted(hash_.order[[2, 4]].tolist()) == mask.nonzero()[:, 0].tolist()


def test_the_nearest_stored_mask_opens_or_none_does():
    stored = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]).bool()
    memory = ResidualMemory("m", torch.ones(3, 8), stored, hashed(8, 4), threshold=0.75)
    asked = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1, 0, 0]]).bool()
    assert torch.equal(memory.opened(asked), torch.stack([stored[0], stored[1], torch.zeros(8).bool()]))


def test_steps_are_as_long_as_said():
    """Plain numbers: a gradient above the bound is shortened to it, one below is taken as it is."""
    values = torch.zeros(2, requires_grad=True)
    step = ClippedDescent(values, learning_rate=0.5, longest=1.0)
    step((values * torch.tensor([3.0, 4.0])).sum()[None], torch.ones(1))
    assert values.tolist() == pytest.approx([-0.3, -0.4])
    step((values * torch.tensor([0.6, 0.0])).sum()[None], torch.ones(1))
    assert values.tolist() == pytest.approx([-0.6, -0.4])


def test_relative_steps_have_the_unit_of_the_first():
    values = torch.zeros(2, 2, requires_grad=True)
    step = ClippedDescent(values, learning_rate=0.5, longest=1.0, unit=4.0)
    step((values * torch.tensor([[30.0, 0], [0, 40.0]])).sum()[None], torch.ones(1))
    assert float(values.detach().square().mean().sqrt()) == pytest.approx(0.5 * 4.0)
    before = values.detach().clone()
    step((values * torch.tensor([[300.0, 0], [0, 0]])).sum()[None], torch.ones(1))  # six times as long
    assert float((values.detach() - before).norm()) == pytest.approx(float(before.norm()))


def test_versions_add_up_in_the_columns_of_their_masks():
    lm = make_lm()
    method = MEMOIR(layer=1, steps=2, context_groups=((1, 2),), top_k=40)
    for prompt in ("The capital of Peru is", "I know"):
        lm.apply(method.edit(lm, [Edit(prompt, target_new="of")]))
    shape = lm.weight(lm.parts.value[1]).shape
    weight, stored = read_memory(lm.patches, shape)
    assert stored.sum(1).tolist() == [40, 40] and torch.equal(weight.any(0), stored.any(0))
    first, second = (read_memory([patch], shape)[0] for patch in lm.patches)
    assert torch.allclose(first + second, weight) and torch.equal(
        pack_masks(stored[:1]), lm.patches[0].state["masks"]
    )


def test_a_memory_of_another_matrix_is_refused():
    lm = make_lm()
    patch = MEMOIR(layer=1, steps=1, context_groups=((1, 2),)).edit(lm, [Edit("I know", target_new="of")])
    out, width = lm.weight(lm.parts.value[1]).shape
    with pytest.raises(PatchError, match=f"expected masks of {width + 8} columns in"):
        read_memory([patch], (out, width + 8))
    with pytest.raises(PatchError, match=f"expected {out + 1} x .* numbers for the masks"):
        read_memory([patch], (out + 1, width))


@pytest.mark.parametrize("top_k", [10**6, 1])
def test_a_memory_whose_masks_have_not_k_columns_is_refused(top_k, tmp_path):
    lm = make_lm()
    patch = MEMOIR(layer=1, steps=1, context_groups=(), top_k=20).edit(lm, [Edit("I know", target_new="of")])
    text = lm.generate("I know", 2)
    wrong = replace(patch, memory=patch.memory | {"top_k": top_k})
    with pytest.raises(
        PatchError, match=rf"^expected masks of {top_k} columns, the memory's top_k, in .*; got 20: edit again$"
    ):
        lm.apply(Patch.load(wrong.save(tmp_path / "wrong.patch")))
    assert lm.generate("I know", 2) == text and not lm.patches
    lm.apply(patch)
    assert int(MEMOIR.running_memory(lm, lm.patches).stored.sum()) == 20


def test_versions_whose_masks_have_not_one_k_are_refused():
    lm = make_lm()
    method = MEMOIR(layer=1, steps=1, context_groups=())
    lm.apply(replace(method, top_k=20).edit(lm, [Edit("I know", target_new="of")]))
    with lm.unpatched():
        other = replace(method, top_k=30).edit(lm, [Edit("The capital of Peru is", target_new="of")])
    with pytest.raises(PatchError, match=r"expected masks of 20 columns, the memory's top_k, in .*; got 30"):
        lm.apply(replace(other, follows=lm.patches[0].id))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_mask_for_each_edit_or_the_memory_is_refused(rows):
    lm = make_lm()
    edits = [Edit("I know", target_new="of"), Edit("The capital of Peru is", target_new="in")]
    patch = MEMOIR(layer=1, steps=1, context_groups=()).edit(lm, edits)
    wrong = replace(patch, state=patch.state | {"masks": patch.state["masks"][[0, 1, 1]][:rows]})
    with pytest.raises(PatchError, match=f"^expected 2 masks, one for each edit, in .*; got {rows}: edit again$"):
        lm.apply(wrong)
