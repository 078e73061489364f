"""Every layout that is exported to GGUF, its matrices all changed, in the real llama.cpp beside transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("xllamacpp")

import xllamacpp

from conftest import make_lm, some_patch
from families import slow_but
from gguf_models import ARCHITECTURES, write_gguf
from reknow import LM
from reknow.errors import PatchError
from reknow.export.gguf_adapter import export_gguf_lora
from reknow.export.gguf_model import export_gguf
from reknow.export.gguf_names import _ARCHITECTURES, find_places, llama_cpp_name
from reknow.patching.deltas import LowRank

pytestmark = pytest.mark.engines

PROMPTS = ([0, 10, 40, 80, 120, 200], [0, 30, 31, 7, 250, 99, 10])
"""Tokens, so that no tokenizer counts."""
TOP = 10
_LETTER = 44


def read_by(model: Path, *adapters: Path) -> Callable[[list[int]], dict[int, float]]:
    """llama.cpp: from a prompt to the likeliest next tokens with their log-probabilities."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 64, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 1.0) for file in adapters]
    server = xllamacpp.Server(params)

    def ask(prompt: list[int]) -> dict[int, float]:
        # What is drawn is one letter, since half a character is held back, with its probabilities, which are those of
        # the model whatever is drawn.
        asked = dict(prompt=prompt, max_tokens=1, temperature=0.0, logprobs=TOP, logit_bias=[[_LETTER, 100.0]])
        (said,) = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        return {each["id"]: each["logprob"] for each in said["top_logprobs"]}

    return ask


def read_here(lm: LM, prompt: list[int]) -> dict[int, float]:
    logits = lm.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    return {int(i): float(logits[i]) for i in logits.topk(TOP).indices}


def far(found: dict[int, float], wanted: dict[int, float]) -> float:
    """The largest difference of two readings; infinite where other tokens are likely."""
    if not set(list(wanted)[:-2]) <= found.keys():  # the last ones may be near others
        return float("inf")
    return max(abs(wanted[token] - found[token]) for token in wanted.keys() & found.keys())


def known_matrices(lm: LM) -> list[str]:
    """All linear maps of the model's blocks whose place in a GGUF file is known."""
    names = []
    for name, module in lm.model.named_modules():
        if getattr(module, "weight", None) is not None and module.weight.dim() == 2:
            try:
                find_places(lm, [name], llama_cpp_name(lm))
            except PatchError:
                continue
            names.append(name)
    return names


def change_all(lm: LM) -> None:
    """Applies a patch of rank two of all of them."""
    torch.manual_seed(3)
    deltas = {}
    for name in known_matrices(lm):
        weight = lm.base_weight(name)
        left, right = torch.randn(weight.shape[0], 2), torch.randn(2, weight.shape[1])
        size = 0.5 * float(weight.norm() / (left @ right).norm())
        deltas[name] = LowRank(size * left, right)
    lm.apply(replace(some_patch(lm), deltas=deltas))


@pytest.mark.parametrize("family", slow_but(("gpt2", "llama"), _ARCHITECTURES))
def test_llama_cpp_computes_what_transformers_does(family, tmp_path):
    lm = make_lm(family, max_position_embeddings=128)
    base = write_gguf(lm, tmp_path / "base.gguf", "F32")
    unedited = [read_here(lm, prompt) for prompt in PROMPTS]
    assert max(far(found, read_by(base)(prompt)) for prompt, found in zip(PROMPTS, unedited, strict=True)) < 0.01
    change_all(lm)
    kinds = {tuple(name.split(".")[-2:]) for name in lm.patches[0].deltas}
    assert len(lm.patches[0].deltas) == len(kinds) * lm.layers and len(kinds) >= (3 if family == "gpt_neox" else 4)
    adapter, written = export_gguf_lora(lm, tmp_path / "adapter", base), export_gguf(lm, base, tmp_path / "new.gguf")
    for ask in (read_by(base, adapter.adapter), read_by(written.file)):
        for prompt, before in zip(PROMPTS, unedited, strict=True):
            wanted = read_here(lm, prompt)
            assert far(wanted, before) > 0.5
            assert far(ask(prompt), wanted) < 0.01


def test_all_layouts_are_tried():
    assert _ARCHITECTURES.keys() == ARCHITECTURES.keys()
