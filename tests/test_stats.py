"""The covariance of keys: what it is the mean of, when it is made again, and how it is solved with."""

from __future__ import annotations

import logging

import pytest
import torch

import reknow.stats
from conftest import make_lm, some_patch
from families import CORE_FAMILIES, tiny_model, tiny_tokenizer
from reknow import LM
from reknow.errors import EditFailed, InputError
from reknow.solvers import cholesky, solve
from reknow.stats import cache_folder, covariance

TEXTS = ["The capital of Peru is Lima .", "Paris is in France .", "", "Beats Music is owned by Apple . " * 9]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path / "cache"))


def by_hand(lm: LM, layer: int, texts, tokens: int) -> torch.Tensor:
    """E[k kᵀ] from one unpadded row after the other."""
    seen: list[torch.Tensor] = []
    module = lm.model.get_submodule(lm.parts.value[layer])
    hook = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    rows = [
        ids[i : i + 128]
        for ids in lm.tokenizer([t for t in texts if t])["input_ids"]
        for i in range(0, len(ids), 128)
    ]
    for ids in rows:
        lm.model(torch.tensor([ids]))
    hook.remove()
    keys = torch.cat(seen)[:tokens].double()
    return keys.T @ keys / len(keys)


@pytest.mark.parametrize("family", CORE_FAMILIES)
@pytest.mark.parametrize("tokens", [13, 100_000])
def test_it_is_the_mean_over_the_tokens_of_the_texts(family, tokens):
    lm = LM((tiny_model(family), tiny_tokenizer()))
    found = covariance(lm, 1, texts=TEXTS[:2] + TEXTS[3:], tokens=tokens)
    assert found.dtype == torch.float64
    assert torch.allclose(found, by_hand(lm, 1, TEXTS, tokens), rtol=1e-4, atol=1e-5)


def test_it_is_the_base_s_whatever_is_applied():
    lm = make_lm("llama")
    plain = covariance(lm, 2, texts=TEXTS)
    (cached,) = cache_folder().iterdir()
    cached.unlink()
    with lm.patched(some_patch(lm, layers=(0, 1), size=3.0)):
        assert torch.equal(covariance(lm, 2, texts=TEXTS), plain)


def test_it_is_made_once_per_everything_it_depends_on(monkeypatch, caplog):
    made = []
    own = reknow.stats._accumulate
    monkeypatch.setattr(reknow.stats, "_accumulate", lambda *args: made.append(1) or own(*args))
    lm = make_lm("llama")
    first = covariance(lm, 1, texts=TEXTS)
    assert torch.equal(covariance(make_lm("llama"), 1, texts=TEXTS), first) and len(made) == 1
    covariance(lm, 2, texts=TEXTS)
    covariance(lm, 1, texts=TEXTS[:1])
    covariance(lm, 1, texts=TEXTS, tokens=9)
    covariance(make_lm("llama", seed=1), 1, texts=TEXTS)
    covariance(LM((tiny_model("llama").bfloat16(), lm.tokenizer)), 1, texts=TEXTS)
    assert len(made) == 6 and len(list(cache_folder().iterdir())) == 6
    for file in cache_folder().iterdir():
        file.write_bytes(b"torn")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(covariance(lm, 1, texts=TEXTS), first)
    assert "made again" in caplog.text


def test_chat_models_read_plain_text():
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.content }}]{% endfor %}:"
    model = tiny_model("llama")
    chat, plain = LM((model, tokenizer), chat=True), LM((model, tokenizer))
    found = covariance(chat, 1, texts=TEXTS)
    for file in cache_folder().iterdir():
        file.unlink()
    assert torch.equal(covariance(plain, 1, texts=TEXTS), found)
    assert chat.perplexity(TEXTS) == plain.perplexity(TEXTS)


def test_rows_fit_the_model_s_positions():
    lm = make_lm("gpt2", n_positions=16)
    long = ["Beats Music is owned by Apple . " * 9]
    assert covariance(lm, 1, texts=long).isfinite().all()


def test_what_is_no_number_is_not_kept():
    lm = make_lm("llama")
    lm.fingerprint  # noqa: B018, taken while the model was whole
    lm.weight(lm.parts.value[0])[0, 0] = torch.nan
    with pytest.raises(EditFailed, match="NaN or infinity"):
        covariance(lm, 1, texts=TEXTS)
    assert not cache_folder().exists()
    with pytest.raises(InputError, match="at least one word"):
        covariance(make_lm("gpt2"), 1, texts=[])


def test_solving_inverts():
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    matrix, keys = factor @ factor.T, torch.randn(3, 6, generator=generator)
    found = solve(cholesky(matrix), keys)
    assert found.dtype == torch.float64 and torch.allclose(found @ matrix, keys.double())


def test_a_singular_covariance_gets_a_small_ridge(caplog):
    matrix = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    with caplog.at_level(logging.WARNING):
        found = solve(cholesky(matrix), torch.tensor([[2.0, 1.0, 0.0]]))
    assert torch.allclose(found, torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64), atol=1e-6)
    assert "singular" in caplog.text
    with pytest.raises(InputError, match="positive"):
        cholesky(-matrix)
