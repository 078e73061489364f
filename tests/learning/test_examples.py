"""Training examples: what is in the scope of an edit and out of it, and the losses on them."""

from __future__ import annotations

import random

import pytest
import torch

from conftest import make_lm
from reknow import Case, Edit, Probe
from reknow.learning.examples import Averaging, Example, ExampleBatch, LocalityTokens, Losses, make_examples
from reknow.learning.gradients import delta_added
from reknow.model.tokens import Text, split_by_length


def test_an_example_holds_as_many_other_facts_as_are_asked_for():
    edit = Edit("The capital of {} is", subject="Peru", target_new="Paris")
    probes = tuple(Probe(f"The capital of Land {i} is", ("Lima",), "locality", "other") for i in range(3))
    for count, expected in ((1, 1), (2, 2), (9, 3)):
        (example,) = make_examples([Case(edit, probes)], random.Random(0), locality_facts=count)
        assert len({text.prompt for text in example.out_of_scope}) == expected


@pytest.mark.parametrize(
    ("edit_texts", "expected"), [("both", ["prompt", "other"]), ("prompt", ["prompt"]), ("paraphrase", ["other"])]
)
def test_what_must_be_answered_as_the_edit_asks(edit_texts, expected):
    fact = Probe("The sun is", ("hot",), "locality", "other")
    for rephrasings, found in ((("other",), expected), ((), ["prompt"])):
        edit = Edit("prompt", target_new="Paris", rephrasings=rephrasings)
        (example,) = make_examples([Case(edit, (fact,))], random.Random(0), edit_texts=edit_texts)
        assert [text.prompt for text in example.in_scope] == found


def test_what_counts_alike_in_the_losses():
    """Long and short texts, in batches of their own: means over tokens and texts, against the rows read alone."""
    lm, layer = make_lm(), 1
    long = Text("The capital of Peru and of all that is in Peru is", "Lima and Paris")
    found = [Example(long, (long,), (long,)), Example(long, (Text("I", "of"),), (Text("I am", "in"),))]
    deltas = {lm.parts.value[layer]: 0.3 * torch.randn(lm.base_weight(lm.parts.value[layer]).shape)}

    def read(examples: list[Example], locality_tokens: LocalityTokens, average_over: Averaging) -> Losses:
        batch = ExampleBatch(lm, examples, layer, locality_tokens=locality_tokens, average_over=average_over)
        return batch.losses(lambda _: delta_added(lm, deltas))

    kinds: tuple[LocalityTokens, ...] = ("all", "answer")
    alone: list[Losses] = []
    for locality_tokens in kinds:
        alone = [read([example], locality_tokens, "tokens") for example in found]
        texts = read(found, locality_tokens, "texts")
        assert texts.edit.item() == pytest.approx(sum(one.edit.item() for one in alone) / 2, rel=1e-4)
        assert texts.locality.item() == pytest.approx(sum(one.locality.item() for one in alone) / 2, rel=1e-4)
    sizes = [len(row.target_ids) for row in lm.encode([example.in_scope[0] for example in found])]
    tokens = read(found, "answer", "tokens")
    weighted = sum(n * one.edit.item() for n, one in zip(sizes, alone, strict=True)) / sum(sizes)
    assert sizes[0] > sizes[1] and tokens.edit.item() == pytest.approx(weighted, rel=1e-4)
    assert (
        split_by_length([9, 2, 2, 2]) == [[1, 2, 3], [0]]
        and split_by_length([5, 4, 5]) == [[1, 0, 2]]
        and split_by_length([3]) == [[0]]
    )
