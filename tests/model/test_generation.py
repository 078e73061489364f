"""What a model writes behind texts, drawn by the generator that is given."""

from __future__ import annotations

from dataclasses import replace

import torch

from reknow.model.generation import sample
from reknow.model.tokens import Text


def test_greedy_limit_of_the_sampling_is_what_the_model_says(lm, edit):
    rows = lm.encode([Text(edit.text), Text("The capital of Peru is")])
    drawn = sample(lm, rows, 4, temperature=1e-4, top_k=None, generator=torch.Generator().manual_seed(0))
    for row, tokens in zip(rows, drawn, strict=True):
        ids = list(row.ids)
        for token in tokens:
            with torch.no_grad():
                logits = lm.model(torch.tensor([ids])).logits[0, -1]
            logits[lm.tokenizer.eos_token_id] = -torch.inf
            assert token == int(logits.argmax())
            ids.append(token)


def test_high_temperature_is_uniform_over_the_likeliest(lm, edit):
    (row,) = lm.encode([Text(edit.text)])
    with torch.no_grad():
        logits = lm.model(torch.tensor([row.ids])).logits[0, -1]
    logits[lm.tokenizer.eos_token_id] = -torch.inf
    generator = torch.Generator().manual_seed(0)
    drawn = sample(lm, [row] * 300, 1, temperature=1e6, top_k=5, generator=generator)
    counts = torch.tensor([sum(tokens == (int(top),) for tokens in drawn) for top in logits.topk(5).indices])
    assert counts.sum() == 300 and counts.min() > 30


def test_sampling_without_a_cache_gives_the_same(lm, edit, monkeypatch):
    rows = lm.encode([Text(edit.text), Text("The capital of Peru is")])
    options = dict(temperature=2.0, top_k=20)
    cached = sample(lm, rows, 4, generator=torch.Generator().manual_seed(3), **options)
    monkeypatch.setattr(lm, "parts", replace(lm.parts, replayable=False))
    assert sample(lm, rows, 4, generator=torch.Generator().manual_seed(3), **options) == cached
