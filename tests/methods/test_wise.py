"""WISE: the authors' margin loss and merge, masks, shards, routing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conftest import make_lm
from reknow import WISE, Edit
from reknow.datasets.text import text_source
from reknow.editing.contexts import sample_contexts, text_contexts
from reknow.errors import InputError
from reknow.memories.side_memory import Shard
from reknow.methods.wise import margin_loss

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "wise.json").read_text())
QUICK = dict(layer=1, steps=30, context_groups=((1, 3),), unrelated_facts=2)


def edit(prompt: str, target: str = "of") -> Edit:
    return Edit(prompt, target_new=target)


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN["margins"])
def test_margins_are_the_authors(case):
    moved = torch.tensor(case["moved"]).mean(1)  # (rows,)
    found = margin_loss(moved[:-1], moved[-1:], case["alpha"], case["beta"], case["gamma"])
    assert float(found) == pytest.approx(case["loss"], rel=1e-4)


def test_a_shard_changes_its_part_and_no_more():
    lm = make_lm()
    patch = WISE(**QUICK, mask_ratio=0.25).edit(lm, [edit("The capital of Peru is")])
    shard = Shard.new(lm.weight(lm.parts.value[1]).shape, 0.25, 0)
    assert 0.2 < float(shard.mask.float().mean()) < 0.3
    assert torch.equal(patch.state["mask.0"], shard.packed_mask())
    assert len(patch.state["delta.0"]) == int(shard.mask.sum())
    changed = WISE.running_memory(lm, [patch]).deltas[0] != 0
    assert changed.any() and not (changed & ~shard.mask).any()


@pytest.mark.parametrize("retrieve", [False, True])
def test_edits_are_routed_and_other_prompts_are_not(retrieve):
    lm = make_lm()
    prompts = ["The capital of Peru is", "I know Danielle Darrieux", "Where is the Eiffel Tower ?"]
    plain = lm.generate(prompts, 4)
    method = WISE(**QUICK, retrieve=retrieve, shard_size=1, density=1.0, mask_ratio=0.5)
    for prompt in prompts[:2]:
        lm.apply(method.edit(lm, [edit(prompt)]))
    memory = WISE.running_memory(lm, lm.patches)
    assert len(memory.deltas) == (2 if retrieve else 1) == len(memory.thresholds)
    if retrieve:
        assert all(score.correct[0] for score in lm.score(prompts[:2], ["of", "of"]))
    lm.revert(lm.patches[-1])
    assert lm.score(prompts[:1], ["of"])[0].correct == (True,)
    least = float(lm.patches[0].state["distances"].min())
    assert float(WISE.running_memory(lm, lm.patches).thresholds) == pytest.approx(method.threshold * least)
    lm.revert(lm.patches[-1])
    assert lm.generate(prompts, 4) == plain


def test_edits_one_by_one_are_those_of_one_call():
    """Each version has the change that it made; together they are the memory."""
    lm, method = make_lm(), WISE(**QUICK, shard_size=2)
    edits = [edit("The capital of Peru is"), edit("I know", "in"), edit("Who is Zoë Übel")]
    batch = method.edit(lm, edits)
    assert sorted(batch.state) == ["delta.0", "delta.1", "distances", "mask.0", "mask.1"]
    for one in edits:
        lm.apply(method.edit(lm, [one]))
    assert "mask.0" not in lm.patches[1].state and sorted(lm.patches[2].state) == ["delta.1", "distances", "mask.1"]
    a, b = WISE.running_memory(lm, [batch]), WISE.running_memory(lm, lm.patches)
    assert torch.allclose(a.deltas, b.deltas, atol=1e-4) and torch.allclose(a.thresholds, b.thresholds, rtol=1e-3)


def test_one_memory_has_one_size_of_shards():
    """An edit's number and that size say in which shard it lies."""
    lm, quick = make_lm(), QUICK | dict(steps=2, retrieve=True)
    lm.apply(WISE(**quick, shard_size=4).edit(lm, [edit(f"The capital of Peru is {i}") for i in range(3)]))
    with pytest.raises(
        InputError, match="expected the shard_size that the memory was begun with; got 1: set it to 4"
    ):
        WISE(**quick, shard_size=1).edit(lm, [edit("I know")])
    assert WISE(**quick).edit(lm, [edit("I know")]).memory["shard_size"] == 4


@pytest.mark.parametrize("wrong", [{"mask_ratio": 0.0}, {"mask_ratio": 2.0}, {"density": 0.0}])
def test_shards_without_room_are_refused(wrong):
    with pytest.raises(InputError, match=f"expected {next(iter(wrong))} above 0 up to 1; got"):
        WISE(**wrong)


def test_contexts_are_general_text_and_as_published_written_by_the_model():
    lm, groups = make_lm(), ((2, 4),)
    own = WISE(context_groups=groups).contexts(lm)
    assert own == text_contexts(lm, groups, text_source()) and len(own) == 3
    assert WISE(context_groups=groups, context_source="model").contexts(lm) == sample_contexts(lm, groups) != own
    assert WISE.paper("llama-2-7b").context_source == "model"
