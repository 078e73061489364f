"""The rules by which clusters of keys grow and split."""

from __future__ import annotations

import pytest
import torch

from reknow.memories.codebook import Clusters


def test_clusters_join_split_and_forget():
    table = Clusters()
    a, b = (1,), (2,)
    table.insert(torch.tensor([0.0, 0.0]), a, 0, radius=1.0, scale=1.0)
    table.insert(torch.tensor([1.8, 0.0]), a, 1, radius=1.0, scale=1.0)
    (one,) = table.clusters
    assert one.centre.tolist() == pytest.approx([0.9, 0]) and one.radius == 1.0 and len(one.members) == 2
    table.insert(torch.tensor([9.0, 0.0]), a, 2, radius=1.0, scale=1.0)
    assert len(table.clusters) == 2
    table.insert(torch.tensor([0.9, 1.0]), b, 3, radius=1.0, scale=1.0)
    split, other = table.clusters[0], table.clusters[2]
    assert split.radius == pytest.approx(0.5, abs=1e-4) and other.radius == pytest.approx(0.5, abs=1e-4)
    assert split.members == [], "both of its keys lie 0.9 from the centre, and are forgotten"
    table.insert(torch.tensor([0.9, 1.0]), a, 4, radius=1.0, scale=1.0)
    assert other is not table.clusters[2] and table.clusters[2].answer == a and table.clusters[2].members[0][1] == 4
