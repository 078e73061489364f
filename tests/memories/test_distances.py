"""The unit of distances between prompts."""

from __future__ import annotations

import pytest
import torch

from conftest import make_lm
from reknow import DEFER, Edit
from reknow.datasets.facts import load_facts
from reknow.memories.distances import distance_scale, prompt_states
from reknow.model.tokens import Text


@pytest.mark.slow
def test_distances_are_in_units_of_questions_alike():
    lm = make_lm()
    alike = [fact.text for fact in load_facts("pararel") if fact.prompt == load_facts("pararel")[0].prompt][:8]
    rows = lm.encode([Text(text) for text in alike])
    keys, _ = prompt_states(lm, rows, lm.parts.value[1])
    unit = distance_scale(lm, lm.parts.value[1])
    assert 0 < unit < 10 * float(torch.cdist(keys, keys).max())
    with lm.patched(DEFER(layer=0, steps=2).edit(lm, [Edit("The capital of Peru is", target_new="of")])):
        lm.memo.clear()
        assert distance_scale(lm, lm.parts.value[1]) == unit, "of the base model, whatever is applied"
