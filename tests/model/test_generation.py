"""What a model writes behind texts, drawn by the generator that is given."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from reknow.errors import InputError
from reknow.model.generation import _Written, sample, sample_tokens
from reknow.model.tokens import EncodedText, Text


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


@pytest.mark.parametrize(("temperature", "top_k"), [(100.0, 50), (1.0, None), (0.7, 5)])
def test_every_token_has_the_chance_that_transformers_gives_it(lm, edit, monkeypatch, temperature, top_k):
    """By `generate`, which the authors of In-Context Editing call, at a temperature of 100 among the 50 likeliest.
    Both are made to take the likeliest, so that every step is behind the same tokens."""
    heard: list[torch.Tensor] = []

    def likeliest(chances: torch.Tensor, *_count: int, **_options) -> torch.Tensor:
        heard.append(chances)
        return chances.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", likeliest)
    (row,) = lm.encode([Text(edit.text)])
    ids = torch.tensor([row.ids], device=lm.device)
    options = dict(do_sample=True, temperature=temperature, top_k=top_k or 0, max_new_tokens=3, min_new_tokens=3)
    wanted = lm.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(row.ids) :]
    theirs, heard = heard, []
    (drawn,) = sample(lm, [row], 3, temperature=temperature, top_k=top_k, generator=torch.Generator())
    assert drawn == tuple(wanted.tolist()) and len(heard) == len(theirs) == 3
    for ours, whole in zip(heard, theirs, strict=True):
        kept = whole[0].sort(descending=True).values
        assert torch.allclose(ours[0].cpu(), kept[: ours.shape[1]].cpu(), atol=1e-6)
        assert not kept[ours.shape[1] :].any() and (top_k is None or ours.shape[1] == top_k)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [3, 100])
def test_a_nucleus_is_the_one_of_transformers(top_p, top_k):
    logits = 3 * torch.randn(1, 60, generator=torch.Generator().manual_seed(0))
    kept = TopKLogitsWarper(top_k)(None, logits / 0.7)
    wanted = TopPLogitsWarper(top_p)(None, kept) if top_p < 1 else kept
    generator = torch.Generator().manual_seed(0)
    drawn = sample_tokens(logits.expand(20_000, -1), top_k, 0.7, generator, top_p=top_p)
    share = torch.bincount(drawn, minlength=60) / len(drawn)
    assert (share[wanted[0].isinf()] == 0).all()
    assert torch.allclose(share, wanted[0].softmax(-1), atol=0.015)


@pytest.mark.parametrize("top_p", [0.0, -1.0, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(lm, top_p):
    with pytest.raises(InputError, match="expected top_p above 0 and at most 1"):
        lm.generate("a", top_k=5, top_p=top_p)


def test_sampling_without_a_cache_gives_the_same(lm, edit, monkeypatch):
    rows = lm.encode([Text(edit.text), Text("The capital of Peru is")])
    options = dict(temperature=2.0, top_k=20)
    cached = sample(lm, rows, 4, generator=torch.Generator().manual_seed(3), **options)
    monkeypatch.setattr(lm, "parts", replace(lm.parts, replayable=False))
    assert sample(lm, rows, 4, generator=torch.Generator().manual_seed(3), **options) == cached


# --- what a listener hears ---------------------------------------------------------------------------------------

PROMPTS = ["The mother tongue of Danielle Darrieux is", "The capital of Peru is", "a"]


def test_a_listener_hears_the_texts_piece_by_piece(lm):
    heard: dict[int, list[str]] = {0: [], 1: [], 2: []}
    wanted = lm.generate(PROMPTS, 12)
    assert lm.generate(PROMPTS, 12, listener=lambda i, piece: heard[i].append(piece)) == wanted
    assert ["".join(pieces) for pieces in heard.values()] == wanted
    assert min(map(len, heard.values())) > 3, "while it is written, not at the end"
    sampling = dict(top_k=50, temperature=2.0, seed=4)
    again: list[str] = []
    text = lm.generate(PROMPTS[0], 12, listener=lambda i, piece: again.append(piece), **sampling)
    assert text == "".join(again) == lm.generate(PROMPTS[0], 12, **sampling) != wanted[0]


def test_a_listener_ends_a_text_and_the_others_go_on(lm):
    heard = {0: "", 1: "", 2: ""}

    def listen(i, piece):
        heard[i] += piece
        return i == 1 and len(heard[1]) > 3

    wanted = lm.generate(PROMPTS, 12)
    written = lm.generate(PROMPTS, 12, listener=listen)
    assert written[::2] == wanted[::2] == [heard[0], heard[2]]
    assert wanted[1].startswith(written[1]) and 3 < len(heard[1]) < len(wanted[1])


def test_what_a_listener_raises_ends_all_and_leaves_the_model_as_it_was(lm):
    before = lm.generate(PROMPTS, 12)

    def stop(_i, _piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lm.generate(PROMPTS, 12, listener=stop)
    assert lm.generate(PROMPTS, 12) == before and torch.is_grad_enabled()


class Spelling:
    """A tokenizer whose tokens are bytes, and which takes the space from before a full stop."""

    eos_token_id = None

    def decode(self, ids, **_options):
        return bytes(ids).decode(errors="replace").replace(" .", ".")


def test_pieces_are_whole_characters_and_no_space_is_taken_back():
    text = "né à Łódź .".encode()
    heard: list[str] = []
    lm = SimpleNamespace(tokenizer=Spelling(), model=SimpleNamespace(generation_config=None))
    written = _Written(lm, {0: EncodedText((97,), 1)}, [len(text)], lambda _i, piece: heard.append(piece))
    for byte in text:
        written.take(torch.tensor([byte]))
    assert written.texts() == ["".join(heard)] == ["né à Łódź."]
    assert "�" not in "".join(heard) and len(heard) == len(text), "once for each token"
