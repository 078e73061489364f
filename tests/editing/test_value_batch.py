"""Which facts are read together."""

from __future__ import annotations

import pytest
import torch

from conftest import AuthorsSearch, make_lm
from reknow.editing import value_batch, values
from reknow.editing.value_batch import encode_facts, group_facts, replayed_tokens, token_budget
from reknow.editing.values import find_values
from reknow.edits import Edit

CONTEXTS = ("", "The city. ", "I saw. ")


@pytest.fixture(scope="module")
def gpt2():
    return make_lm("gpt2")


def test_facts_of_unlike_width_do_not_share_a_batch(gpt2):
    """Each fact is in one batch, and one is as wide as its facts unless it is too small to matter."""
    prompts = ["{} is", "{} is a city in", "{} is a city in", "The famous player {}", "{} is a city in the land of"]
    edits = [Edit(prompt, subject="Lima", target_new="Italy") for prompt in prompts * 9]
    facts = encode_facts(gpt2, edits, CONTEXTS)
    batches = group_facts(facts, list(range(len(edits))), *token_budget(gpt2))
    assert sorted(i for batch in batches for i in batch) == list(range(len(edits)))
    widths = [max(replayed_tokens(row) for row in fact) for fact in facts]
    for batch in batches:
        narrow = [i for i in batch if widths[i] < max(widths[i] for i in batch)]
        assert len(narrow) * len(facts[0]) * max([widths[i] for i in narrow], default=0) < 2 * value_batch.FREE_TOKENS
    assert len(batches) > 1


def test_a_gpus_batches_of_unlike_width_find_the_same(gpt2, monkeypatch):
    """Of as many tokens as a large GPU takes, where a step of few costs nothing; the numbers are those of a CPU."""
    prompts = ["{} is", "{} is a city in", "The famous player {}", "{} is a city in the land of"]
    edits = [Edit(prompt, subject="Lima", target_new="Italy") for prompt in prompts * 6]
    large = value_batch.MOST_TOKENS, value_batch.FREE_TOKENS_ON_GPU
    facts = encode_facts(gpt2, edits, CONTEXTS)
    assert len(group_facts(facts, list(range(len(edits))), *large)) == 1
    search = AuthorsSearch(steps=6, site="block")
    apart = find_values(gpt2, edits, 1, CONTEXTS, search)
    monkeypatch.setattr(values, "token_budget", lambda lm: large)
    together = find_values(gpt2, edits, 1, CONTEXTS, search)
    assert torch.allclose(together.z, apart.z, atol=1e-4)
    for one, other in zip(together.losses, apart.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
