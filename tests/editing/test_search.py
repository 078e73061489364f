"""The settings that searching methods share."""

from __future__ import annotations

import torch

from conftest import make_lm
from reknow.editing import factors
from reknow.editing.covariance import covariance
from reknow.methods.memit import MEMIT


def test_what_is_made_of_a_covariance_is_kept_for_the_next_edit(monkeypatch):
    """Once per model, layer, text and setting; and only while it is small."""
    lm, memit = make_lm("gpt2"), MEMIT(covariance_tokens=500)
    made: list[int] = []

    def halved(matrix, part=2):
        made.append(1)
        return matrix / part

    first = memit.from_covariance(lm, 0, halved)
    assert memit.from_covariance(lm, 0, halved) is first and len(made) == 1
    assert torch.equal(memit.from_covariance(lm, 0, halved, 4), covariance(lm, 0, tokens=500) / 4)
    assert not torch.equal(memit.from_covariance(lm, 1, halved), first)
    assert not torch.equal(MEMIT(covariance_tokens=300).from_covariance(lm, 0, halved), first)
    assert len(made) == 4
    monkeypatch.setattr(factors, "_CACHE_BYTES", 2 * first.nbytes)
    memit.from_covariance(lm, 2, halved)  # the oldest make room
    assert torch.equal(memit.from_covariance(lm, 0, halved), first) and len(made) == 6
    assert sum(key[0] == "covariance" for key in lm.memo) == 2
