"""The covariance of keys: what it is the mean of, when it is made again, and how it is solved with."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reknow.editing.covariance
from conftest import make_lm, some_patch, without_weights
from families import CORE_FAMILIES, tiny_model, tiny_tokenizer
from reknow import LM, MEMIT, Edit, method
from reknow.datasets.text import text_source
from reknow.editing.covariance import cache_folder, covariance, enough_tokens, statistics
from reknow.editing.key_sums import _resume, _rows, read_batches
from reknow.editing.solvers import cholesky, solve
from reknow.errors import EditFailed, InputError
from reknow.model.tokens import Text

TEXTS = [
    "The capital of Peru is Lima .",
    "Paris is in France .",
    "",
    " ".join(["Beats Music is owned by Apple ."] * 9),
]
LONG = [f"Beats Music {i} is owned by Apple . " for i in range(1000)]


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
    found = covariance(lm, 1, text=TEXTS[:2] + TEXTS[3:], tokens=tokens)
    assert found.dtype == torch.float32 and torch.equal(found, found.T)
    assert torch.allclose(found.double(), by_hand(lm, 1, TEXTS, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words", [60, 127, 128, 300])
def test_every_row_of_a_long_text_begins_as_the_text(words):
    """With the token that the tokenizer puts before a text, without which some models are lost."""
    lm = make_lm("llama")
    begin = lm.tokenizer.bos_token_id
    (whole,) = lm.encode([Text("Lima " * words)])
    assert whole.ids[0] == begin and begin not in whole.ids[1:]
    rows = [row.ids for row in _rows(lm, iter(["Lima " * words]), 10_000)]
    assert all(ids[0] == begin and len(ids) <= 128 for ids in rows)
    assert [i for ids in rows for i in ids[1:]] == list(whole.ids[1:])
    plain = make_lm("gpt2")  # whose tokenizer puts none
    (whole,) = plain.encode([Text("Lima " * words)])
    rows = [row.ids for row in _rows(plain, iter(["Lima " * words]), 10_000)]
    assert [i for ids in rows for i in ids] == list(whole.ids)
    few = [row.ids for row in _rows(lm, iter(["Lima " * words]), 50)]
    assert sum(map(len, few)) == 50


def test_it_is_the_base_s_whatever_is_applied():
    lm = make_lm("llama")
    plain = covariance(lm, 2, text=TEXTS)
    (cached,) = cache_folder().iterdir()
    cached.unlink()
    with lm.patched(some_patch(lm, layers=(0, 1), size=3.0)):
        assert torch.equal(covariance(lm, 2, text=TEXTS), plain)


def test_it_is_made_once_per_everything_it_depends_on(monkeypatch, caplog):
    made = []
    own = reknow.editing.covariance.sum_keys
    monkeypatch.setattr(reknow.editing.covariance, "sum_keys", lambda *args: made.append(1) or own(*args))
    lm = make_lm("llama")
    first = covariance(lm, 1, text=TEXTS)
    assert torch.equal(covariance(make_lm("llama"), 1, text=TEXTS), first) and len(made) == 1
    covariance(lm, 2, text=TEXTS)
    covariance(lm, 1, text=TEXTS[:1])
    covariance(lm, 1, text=TEXTS, tokens=9)
    covariance(make_lm("llama", seed=1), 1, text=TEXTS)
    covariance(LM((tiny_model("llama").bfloat16(), lm.tokenizer)), 1, text=TEXTS)
    assert len(made) == 6 and len(list(cache_folder().iterdir())) == 6
    for file in cache_folder().iterdir():
        file.write_bytes(b"torn")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(covariance(lm, 1, text=TEXTS), first)
    assert "made again" in caplog.text


def test_a_file_of_another_key_is_not_believed(caplog):
    """Even if its name, a shortened hash, were the same."""
    lm = make_lm("llama")
    first, second = statistics(lm, [1, 2], text=TEXTS).values()
    second.file.replace(first.file)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(covariance(lm, 1, text=TEXTS), first.covariance)
    assert "made again" in caplog.text


def test_several_layers_are_read_in_one_pass(monkeypatch):
    lm = make_lm("llama")
    apart = [covariance(lm, layer, text=TEXTS) for layer in (0, 2)]
    for file in cache_folder().iterdir():
        file.unlink()
    passes = []
    own = lm.forward
    monkeypatch.setattr(lm, "forward", lambda *args: passes.append(1) or own(*args))
    together = statistics(lm, [0, 2], text=TEXTS)
    count = sum(len(row.ids) for batch in read_batches(lm, iter(TEXTS), 100_000) for row in batch)
    assert len(passes) == 1 and [together[layer].tokens for layer in (0, 2)] == [count] * 2
    assert all(torch.equal(together[layer].covariance, one) for layer, one in zip((0, 2), apart, strict=True))
    assert {one.file for one in together.values()} == set(cache_folder().iterdir())


def test_rows_of_like_length_are_read_together():
    """So that little of what is computed is padding."""
    lm = make_lm("gpt2")
    batches = list(read_batches(lm, text_source(None).texts(), 8000))
    rows = [len(row.ids) for batch in batches for row in batch]
    assert sum(rows) == 8000 and all(len(batch) * len(batch[-1].ids) <= 16 * 128 for batch in batches)
    assert sum(len(batch) * max(len(row.ids) for row in batch) for batch in batches) < 1.2 * 8000


def test_wide_matrices_get_more_text():
    """Twenty tokens for each input, no more than has always been enough."""
    widths = {64: 5120, 256: 20_480, 1024: 81_920, 4096: 100_000}
    assert {width: enough_tokens(without_weights("gpt2", n_embd=width, n_head=4)) for width in widths} == widths
    assert MEMIT().covariance_tokens is None and statistics(make_lm("gpt2"), [1], text=TEXTS)[1].tokens < 20_000


def test_a_band_is_read_in_one_pass(monkeypatch):
    """What the statistics of one layer would be read for is enough for those of all."""
    edit = Edit("I know {}", subject="Danielle Darrieux", target_new="of")
    read, own = [], reknow.editing.covariance.sum_keys
    monkeypatch.setattr(reknow.editing.covariance, "sum_keys", lambda task: read.append(task.names) or own(task))
    for name, layers in (("memit", (0, 1, 2)), ("alphaedit", (0, 1, 2)), ("pmet", (0, 2))):
        lm = make_lm("gpt2")
        chosen = method(name, layers=layers, steps=2, context_groups=(), covariance_tokens=300)
        for file in cache_folder().glob("*.safetensors"):
            file.unlink()
        chosen.edit(lm, [edit])
        chosen.edit(lm, [edit])  # with what is kept
        assert read == [[lm.parts.value[layer] for layer in layers]]
        read.clear()


KILLED = """
import os, signal, sys
import reknow.editing.covariance
from conftest import make_lm
from reknow.editing import key_sums
from test_covariance import LONG
key_sums._SAVE_SECONDS = 0.0
own, seen = key_sums.save, []
def save(tensors, file, about):
    own(tensors, file, about)
    if file.name.startswith("sums"):
        seen.append(file)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
key_sums.save = save
reknow.editing.covariance.statistics(make_lm("gpt2"), [0, 2], tokens=100_000, text=LONG)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(monkeypatch, caplog):
    lm = make_lm("gpt2")
    run = subprocess.run([sys.executable, "-c", KILLED], env=environment())
    assert run.returncode == -signal.SIGKILL
    left = [file.name for file in cache_folder().iterdir() if not file.name.endswith(".lock")]
    assert [name[:4] for name in left] == ["sums"], "what was summed, nothing half done"
    own, passes = lm.forward, []
    monkeypatch.setattr(lm, "forward", lambda *args: passes.append(1) or own(*args))
    with caplog.at_level(logging.INFO):
        resumed = statistics(lm, [0, 2], tokens=100_000, text=LONG)
    assert "going on behind" in caplog.text
    assert all(file.name.startswith("covariance") for file in cache_folder().iterdir())
    for one in resumed.values():
        one.file.unlink()
    killed = len(passes)
    whole = statistics(lm, [0, 2], tokens=100_000, text=LONG)
    assert killed == len(passes) - killed - 3 > 0
    for layer in (0, 2):
        assert torch.equal(resumed[layer].covariance, whole[layer].covariance), "the same bits as in one go"
        assert resumed[layer].tokens == whole[layer].tokens


def test_a_broken_running_sum_is_not_used(caplog):
    lm = make_lm("gpt2")
    whole = statistics(lm, [1], text=LONG)[1]
    torn = whole.file.with_name("sums-0.safetensors")
    torn.write_bytes(b"torn")
    with caplog.at_level(logging.WARNING):
        totals, count, following = _resume(torn, {"a": 4})
    assert (totals, count, following) == ({}, 0, 0) and "broken" in caplog.text


SHARED = """
from accelerate import PartialState
from conftest import make_lm
from reknow.editing.covariance import statistics
from test_covariance import LONG
state = PartialState(cpu=True)
assert state.num_processes == 2
one = statistics(make_lm("gpt2"), [0, 2], tokens=100_000, text=LONG, state=state)
assert one[0].tokens == one[2].tokens
state.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_share_the_text_and_their_sums_are_added(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    subprocess.run([sys.executable, *launcher], env=environment(), check=True)
    lm = make_lm("gpt2")
    lm.computes_statistics = False
    shared = statistics(lm, [0, 2], tokens=100_000, text=LONG)
    for one in shared.values():
        one.file.unlink()
    lm.computes_statistics = True
    alone = statistics(lm, [0, 2], tokens=100_000, text=LONG)
    for layer in (0, 2):
        assert shared[layer].tokens == alone[layer].tokens
        assert torch.allclose(shared[layer].covariance, alone[layer].covariance, rtol=1e-12, atol=1e-12)


def environment() -> dict[str, str]:
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(Path(reknow.__file__).parents[1])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def test_where_none_may_be_computed_they_are_refused():
    lm = make_lm("gpt2")
    lm.computes_statistics = False
    with pytest.raises(InputError, match="reknow stats --layers 1 first"):
        covariance(lm, 1, text=TEXTS)
    edit = Edit("I know {}", subject="Danielle Darrieux", target_new="of")
    for name in ("rome", "memit", "emmet", "pmet", "alphaedit"):
        place = {"layer": 1} if name in ("rome", "emmet") else {"layers": (1,)}
        with pytest.raises(InputError, match="statistics of layer 1"):
            method(name, steps=2, context_groups=(), covariance_tokens=100, **place).edit(lm, [edit])
    lm.computes_statistics = True
    covariance(lm, 1, tokens=100)
    lm.computes_statistics = False
    assert method("rome", layer=1, steps=2, context_groups=(), covariance_tokens=100).edit(lm, [edit])


def test_chat_models_read_plain_text():
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.content }}]{% endfor %}:"
    model = tiny_model("llama")
    chat, plain = LM((model, tokenizer), chat=True), LM((model, tokenizer))
    found = covariance(chat, 1, text=TEXTS)
    for file in cache_folder().iterdir():
        file.unlink()
    assert torch.equal(covariance(plain, 1, text=TEXTS), found)
    assert chat.perplexity(TEXTS) == plain.perplexity(TEXTS)


def test_rows_fit_the_model_s_positions():
    lm = make_lm("gpt2", n_positions=16)
    long = ["Beats Music is owned by Apple . " * 9]
    assert covariance(lm, 1, text=long).isfinite().all()


def test_what_is_no_number_is_not_kept():
    lm = make_lm("llama")
    lm.fingerprint  # noqa: B018, taken while the model was whole
    lm.weight(lm.parts.value[0])[0, 0] = torch.nan
    with pytest.raises(EditFailed, match="NaN or infinity"):
        covariance(lm, 1, text=TEXTS)
    assert not cache_folder().exists()
    with pytest.raises(InputError, match="at least one word"):
        covariance(make_lm("gpt2"), 1, text=[])
    for none in (0, -5):
        with pytest.raises(InputError, match="at least one token"):
            covariance(make_lm("gpt2"), 1, tokens=none, text=TEXTS)


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
