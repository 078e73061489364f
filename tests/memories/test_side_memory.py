"""Shards of a side memory, their merge, distances."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reknow.memories.side_memory import distance, divide, ties

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "wise.json").read_text())


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDEN["ties"])
def test_ties_is_the_authors_merge(case):
    found = ties([torch.tensor(change) for change in case["changes"]], case["density"])
    assert torch.allclose(found, torch.tensor(case["merged"]), atol=1e-5)


def test_distance_counts_the_tokens_of_its_mask():
    inputs = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
    where = torch.tensor([[True, True, False]])
    assert distance(inputs, where, torch.eye(2)).tolist() == [3.5]


def test_a_shard_has_as_many_weights_for_each_edit_as_in_the_paper():
    assert divide(4096 * 11008) == (500, 0.2)  # Llama-2 7B
    size, share = divide(256 * 1024)
    assert size == 10 and share * 256 * 1024 == pytest.approx(10 * 18_000)
    assert divide(32 * 128) == (10, 1.0)  # as much as there is
    assert divide(256 * 1024, 3, 0.5) == (3, 0.5)
