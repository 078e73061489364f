"""Nearest neighbours and the embeddings they search."""

from __future__ import annotations

import pytest
import torch

from reknow.errors import InputError, MissingExtra
from reknow.memories.nearest import Nearest

TEXTS = ["I know Danielle Darrieux", "The capital of Peru is", "Who is Zoë Übel ? She is", "Lima"]


@pytest.fixture(scope="module")
def vectors():
    return torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))


def test_exact_search_is_that_of_all_distances(vectors):
    queries = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    distances, places = Nearest(vectors).search(queries, 5)
    every = (queries[:, None] - vectors[None]).pow(2).sum(-1)
    expected = every.sort(dim=1)
    assert torch.equal(places, expected.indices[:, :5])
    torch.testing.assert_close(distances, expected.values[:, :5])


def test_a_stored_vector_is_at_distance_0(vectors):
    distances, places = Nearest(vectors * 100).search(vectors[7:8] * 100)
    assert places.item() == 7 and distances.item() == 0.0


def test_more_neighbours_than_there_are(vectors):
    distances, places = Nearest(vectors[:3]).search(vectors[:1], 10)
    assert places.shape == (1, 3) and bool((distances.diff() >= 0).all())


def test_an_empty_memory_is_refused():
    with pytest.raises(InputError, match="the memory is empty"):
        Nearest(torch.empty(0, 16))


@pytest.mark.parametrize("stored", [5, 2000])
def test_approximate_search(vectors, stored):
    pytest.importorskip("faiss")
    vectors = vectors[:stored]
    index, again = (Nearest(vectors, approximate=True) for _ in range(2))
    distances, places = index.search(vectors[:200] + 1e-3, 3)
    assert torch.equal(places[:, 0], torch.arange(min(200, stored)))
    exact, _ = Nearest(vectors).search(vectors[:200] + 1e-3, 3)
    torch.testing.assert_close(distances[:, 0], exact[:, 0])
    assert all(
        torch.equal(a, b) for a, b in zip((distances, places), again.search(vectors[:200] + 1e-3, 3), strict=True)
    )


def test_without_faiss_the_extra_is_named(vectors, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtra, match=r"pip install 'reknow\[retrieval\]'"):
        Nearest(vectors, approximate=True)
