"""Beginnings that rows share are run once, and the rows have the keys, values and states of a pass of their own."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from conftest import close, make_lm
from families import FAMILIES
from reknow.model.beginnings import Beginnings, left_cache, read_inputs
from reknow.model.tokens import EncodedText

CONTEXTS = ((), (7, 8, 9, 10, 11, 12), (20, 21, 22, 23, 24))
PROMPTS = ((40, 41), (50,), (60, 61, 62, 63), (40, 42))
ROWS = [EncodedText((*c, *p, 99, 100), len(c) + len(p) + 1) for p in PROMPTS for c in CONTEXTS]
"""Of which the last but one token is looked at, as a subject's last is."""
LAST = [len(row.ids) - 2 for row in ROWS]
ALL = {family: (family, {}) for family in FAMILIES}
ALL["gemma3, window of 3"] = "gemma3_text", dict(sliding_window=3)


@pytest.mark.parametrize("name", ALL)
def test_rows_behind_shared_beginnings_have_the_keys_of_a_pass_of_their_own(name):
    family, changes = ALL[name]
    lm = make_lm(family, **changes)
    batch, columns = lm.pad(ROWS, LAST), max(LAST)
    plain = DynamicCache(config=lm.model.config)
    with torch.no_grad():
        lm.forward(batch.ids[:, :columns], batch.mask[:, :columns], batch.positions[:, :columns], plain)
    real = batch.mask[:, None, :columns].bool()
    for layer, own in zip(left_cache(lm, batch, columns).layers, plain.layers, strict=True):
        seen = real[:, :, -own.keys.shape[2] :].expand(own.keys.shape[:3])
        assert close(layer.keys[seen], own.keys[seen]) and close(layer.values[seen], own.values[seen])
        assert layer.get_seq_length() == columns
    matrix = lm.parts.value[1]
    assert close(read_inputs(lm, ROWS, LAST, matrix), lm.read(ROWS, LAST, inputs=[matrix]).inputs[matrix])


def test_a_beginning_is_the_one_that_spares_most():
    """A context that all share, not the longer one behind it that two share; nothing where rows begin unlike."""
    begun = Beginnings([row.ids[:last] for row, last in zip(ROWS, LAST, strict=True)])
    assert begun.worth
    assert begun.missing == [1, 2, 2, 1, 1, 1, 4, 4, 4, 1, 2, 2]
    assert not Beginnings([(1, 2, 3), (2, 3, 4), (3,), ()]).worth


def test_most_tokens_are_not_run_again(monkeypatch):
    lm, run = make_lm(), []
    own = lm.forward
    monkeypatch.setattr(lm, "forward", lambda ids, *a, **k: run.append(ids.numel()) or own(ids, *a, **k))
    rows = [EncodedText((*range(10, 40), *prompt), 30) for prompt in PROMPTS * 5]
    left_cache(lm, lm.pad(rows), 33)
    assert sum(run) < 30 + 4 * len(rows)
