"""Scope classifiers: the authors' loss, and the states that they read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import make_lm, some_patch
from reknow.memories.serac.scope import AttentionPooling, Cross, log_in_scope, scope_loss
from reknow.memories.serac.states import StateCache, token_states

GOLDEN = Path(__file__).parent.parent / "golden"
VECTORS = json.loads((GOLDEN / "serac.json").read_text())
QUESTION = "Where is the capital of Danielle Darrieux ? It is in"


@pytest.mark.golden
@pytest.mark.parametrize("case", [c for c in VECTORS["cases"] if c["cos"] or c["square"]], ids=str)
def test_scope_loss_is_the_authors(case):
    edits, inputs = (torch.tensor(VECTORS[name], requires_grad=True) for name in ("edits", "inputs"))
    log_p = log_in_scope(inputs, edits, cosine=case["cos"])
    torch.testing.assert_close(log_p, torch.tensor(case["log_p"]), rtol=1e-4, atol=1e-5)
    outside = log_p[3:].flatten() if case["all_negatives"] else log_p[3:].diag()
    loss = scope_loss(log_p[:3].diag(), outside)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    loss.backward()
    for found, name in ((edits, "grad_edits"), (inputs, "grad_inputs")):
        torch.testing.assert_close(found.grad, torch.tensor(case[name]), rtol=1e-4, atol=1e-5)


def test_a_pair_that_is_surely_in_scope_has_a_finite_loss_outside():
    assert math.isfinite(scope_loss(torch.zeros(1), torch.zeros(1)).item())


@pytest.mark.parametrize("kind", ["embedding", "cross"])
def test_padding_changes_no_vector_and_no_verdict(kind):
    read = token_states(make_lm("llama"), None)
    torch.manual_seed(0)
    texts = [QUESTION, "Lima"]
    together, alone = read(texts), [read([text]) for text in texts]
    if kind == "embedding":
        scope = AttentionPooling(read.features, 16, 4)
        torch.nn.init.normal_(scope.attention.weight)
        found, expected = scope(together), torch.cat([scope(one) for one in alone])
    else:
        scope = Cross(read.features)
        found = scope(together, (together[0].flip(0), together[1].flip(0)))
        expected = torch.cat([scope(a, b) for a, b in (alone, alone[::-1])])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [2**20, 1])
def test_states_are_read_once_while_there_is_room(limit):
    read, asked = token_states(make_lm(), None), []
    cache = StateCache(lambda texts: (asked.append(list(texts)), read(texts))[1], limit)
    texts = [QUESTION, "Lima", QUESTION]
    for _ in range(2):
        (found, real), (expected, mask) = cache(texts), read(texts)
        assert torch.equal(real, mask)
        torch.testing.assert_close(found[real], expected[mask], rtol=1e-3, atol=2e-3)
    assert asked == [[QUESTION, "Lima"]] if limit > 1 else len(asked) == 2


def test_an_encoder_is_the_same_however_often_it_is_loaded():
    """Even where its checkpoint lacks weights that nobody reads here, and that are drawn when it is loaded."""
    digests = []
    for seed in range(2):
        torch.manual_seed(seed)
        digests.append(token_states(make_lm(), str(GOLDEN / "tiny_bert")).digest)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_token_states_are_those_of_the_base(family):
    lm = make_lm(family)
    read = token_states(lm, None)
    expected = read([QUESTION])[0]
    with lm.patched(some_patch(lm, size=1.0, layers=(0,))):
        assert torch.equal(read([QUESTION])[0], expected)
