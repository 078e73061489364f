"""Which facts are read together."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from conftest import AuthorsSearch, make_lm
from reknow.editing import value_batch, values
from reknow.editing.value_batch import (
    MOST_TOKENS_OF_FACT,
    encode_facts,
    group_facts,
    number_of_batches,
    replayed_tokens,
    split_contexts,
    spread_over_contexts,
    token_budget,
)
from reknow.editing.values import find_values
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.methods.memit import MEMIT

CONTEXTS = ("", "The city. ", "I saw. ")


@pytest.fixture(scope="module")
def gpt2():
    return make_lm("gpt2")


def test_facts_of_unlike_width_do_not_share_a_batch(gpt2):
    """Each fact is in one batch, and what a batch pads costs less than another batch would."""
    prompts = ["{} is", "{} is a city in", "{} is a city in", "The famous player {}", "{} is a city in the land of"]
    edits = [Edit(prompt, subject="Lima", target_new="Italy") for prompt in prompts * 9]
    facts = encode_facts(gpt2, edits, CONTEXTS)
    limit, free = token_budget(gpt2)
    assert free == value_batch.PACKED_FREE_TOKENS, "it runs without padding"
    free //= 4  # so few facts would all be in one group
    batches = group_facts(facts, list(range(len(edits))), limit, free)
    assert sorted(i for batch in batches for i in batch) == list(range(len(edits)))
    widths = [max(replayed_tokens(row) for row in fact) for fact in facts]

    def padded(batch) -> int:
        return sum(max(widths[i] for i in batch) - widths[i] for i in batch) * len(facts[0])

    assert all(padded(batch) <= free for batch in batches)
    for batch, following in pairwise(batches):
        next_one = min(following, key=lambda i: widths[i])
        assert padded([*batch, next_one]) > free, "no group is opened in vain"
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


def test_what_is_padded_is_counted_in_the_contexts_of_a_pass(gpt2):
    edits = [Edit(prompt, subject="Lima", target_new="Italy") for prompt in ["{} is"] * 5 + ["{} is a city in"] * 5]
    facts, index = encode_facts(gpt2, edits, CONTEXTS), list(range(10))
    narrow, wide = (max(replayed_tokens(row) for row in facts[i]) for i in (0, 9))
    padded = 5 * 2 * (wide - narrow)  # of 5 facts a context and the KL prompt
    assert len(group_facts(facts, index, 4096, padded, 3)) == 1
    assert len(group_facts(facts, index, 4096, padded - 1, 3)) == len(group_facts(facts, index, 4096, padded)) == 2


def test_contexts_of_long_texts_are_split_further(gpt2):
    """So that a pass runs about as many tokens of a fact as the bound says; never where all are to be read."""
    contexts = ("", *(f"The city {n}. " for n in range(11)))
    short = Edit("{} is", subject="Lima", target_new="Italy")
    long = Edit(
        "{} is the city in the land of the old player , and", subject="Lima", target_new="it lies in the North"
    )
    (few,), (many,) = ([fact] for fact in encode_facts(gpt2, [short, long], contexts))
    tokens = [sum(map(replayed_tokens, fact[:-1])) for fact in (few, many)]
    assert tokens[0] <= 2 * MOST_TOKENS_OF_FACT < tokens[1]
    assert number_of_batches([few], 2) == 2 and number_of_batches([few, many], 1) == 1
    split = number_of_batches([few, many], 2)
    assert split == -(-tokens[1] // MOST_TOKENS_OF_FACT) > 2
    assert number_of_batches([[*many[:3], many[-1]]], 2) == 2, "a few contexts are few tokens"
    found = {}
    for wanted in (1, 2):
        method = AuthorsSearch(steps=3, context_batches=wanted)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(values, "split_contexts", lambda *given: found.setdefault(given[-1], given) and 1 / 0)
            with pytest.raises(ZeroDivisionError):
                find_values(gpt2, [long], 1, contexts, method)
    assert set(found) == {1, split}


def test_the_spread_over_contexts_is_that_of_all_pairs():
    states = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    pairs = [(states[:, i] - states[:, j]).square().sum(1) for i in range(4) for j in range(i)]
    total, length = torch.stack(pairs).sum(0), states.square().sum(2).mean(1)
    assert torch.allclose(spread_over_contexts(states, relative=False), total / 6, rtol=1e-5)
    assert torch.allclose(spread_over_contexts(states, relative=True), total / 6 / length, rtol=1e-5)  # six pairs
    assert torch.allclose(spread_over_contexts(1e3 * states, relative=True), total / 6 / length, rtol=1e-5)
    assert spread_over_contexts(states[:, :1], relative=True).abs().max() < 1e-5


def test_a_search_that_weighs_the_spread_ends_with_less_of_it(gpt2):
    edits = [
        Edit("{} is a city in", subject="Lima", target_new="Italy"),
        Edit("I know {}", subject="Peru", target_new="of"),
    ]
    weights = torch.full((3,), 1 / 3)

    def spread(weight: float) -> torch.Tensor:
        method = MEMIT(steps=25, context_batches=1, stop_probability=1.0, min_delta=0.0, context_variance=weight)
        delta = find_values(gpt2, edits, 0, CONTEXTS, method).delta
        (batch,) = split_contexts(gpt2, encode_facts(gpt2, edits, CONTEXTS), weights, 0, 1)
        return batch.score(delta[None], above=2).spread

    assert bool((spread(30.0) < 0.9 * spread(0.0)).all())


def test_a_pass_has_two_contexts_to_compare_or_none_is_weighed(gpt2):
    edits = [Edit("I know {}", subject="Peru", target_new="of")]
    settings = dict(steps=3, stop_probability=1.0, min_delta=0.0)
    one, two, plain = (
        find_values(gpt2, edits, 0, CONTEXTS[:2], MEMIT(**settings, context_batches=number, context_variance=weight))
        for number, weight in ((1, 9.0), (2, 9.0), (1, 0.0))
    )
    assert torch.equal(one.delta, two.delta) and not torch.equal(one.delta, plain.delta)
    with pytest.raises(InputError, match="expected two contexts for context_variance; got one"):
        find_values(gpt2, edits, 0, CONTEXTS[:1], MEMIT(**settings, context_variance=9.0))
