"""Scored tokens have the losses of one plain pass, in whatever batch and above whatever layer they are read."""

from __future__ import annotations

import pytest
import torch

from conftest import make_lm
from reknow import LM
from reknow.model.scored_tokens import AnswerLoss, ScoredTokens, predictions
from reknow.model.tokens import Text


def nll(lm: LM, text: Text) -> torch.Tensor:
    """NLL of the target's tokens, by one plain pass of the model."""
    (row,) = lm.encode([text])
    log_probs = lm.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    return -log_probs[:-1].gather(1, torch.tensor(row.ids[1:])[:, None])[row.prompt_length - 1 :, 0]


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_scored_places_are_those_of_one_row_alone(lm, edit, layer):
    texts = [Text(edit.text, "English"), Text("Lima is the capital of", "Peru")]
    rows = lm.encode(texts)
    scored = ScoredTokens(lm, rows, [predictions(row, row.prompt_length) for row in rows], layer)
    with torch.no_grad():
        alone = torch.cat([nll(lm, text) for text in texts])
        assert torch.allclose(scored.nll(), alone, atol=1e-4)


def test_losses_of_rows_are_means_over_their_tokens_in_the_order_of_the_rows(lm, edit):
    texts = [Text(edit.text, "English"), Text("Lima is the capital of", "Peru in the south"), Text("Lima", "is")]
    rows = lm.encode(texts)
    scored = ScoredTokens(lm, rows, [predictions(row, row.prompt_length) for row in rows], 1)
    with torch.no_grad():
        alone = torch.stack([nll(lm, text).mean() for text in texts])
        assert torch.allclose(scored.row_nll(), alone, atol=1e-4)
        assert torch.allclose(AnswerLoss(lm, rows, 1).nll(), alone, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bloom"])
def test_what_was_said_at_first_stays(family):
    lm = make_lm(family)
    rows = lm.encode([Text("The capital of Peru is", "Lima"), Text("I am", "in Lima and Paris"), Text("Paris", "is")])
    scored = ScoredTokens(lm, rows, [predictions(row, row.prompt_length) for row in rows], 1, keep=True)
    before = scored.log_probs()
    first = scored.log_probs_at_first()
    torch.testing.assert_close(first, before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        lm.weight(lm.parts.value[2]).mul_(-1)
    assert torch.equal(scored.log_probs_at_first(), first) and not torch.allclose(scored.log_probs(), before)
