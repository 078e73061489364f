"""Every type of causal language model of the installed transformers loads, or is refused in one sentence."""

from __future__ import annotations

from functools import cache

import pytest

from conftest import some_patch
from every_type import tiny, types
from families import tiny_tokenizer
from reknow import LM
from reknow.errors import ModelError

pytestmark = pytest.mark.slow

EXPERTS = "it is a mixture of experts"
NO_MLP = "no matrices from the hidden state into the MLP were found"
PADDING = "padding changes its logits"
REFUSED = {
    EXPERTS: """
        afmoe axk1 deepseek_v2 deepseek_v4 ernie4_5_moe exaone_moe flex_olmo glm4_moe gpt_oss granitemoe hy_v3 jamba
        jetmoe llama4 llama4_text minimax mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_moe qwen3_next solar_open
    """,
    NO_MLP: """
        bert big_bird electra falcon_mamba mamba mamba2 megatron-bert roberta rwkv xlm-roberta xlnet zamba zamba2
    """,
    PADDING: "bart blenderbot marian mbart pegasus plbart recurrent_gemma trocr whisper xlstm",
    "its blocks hand on several states for a token": "gemma3n_text",
    "its tokens see later ones": "prophetnet",
    "no list of 16 blocks was found": "hrm_text",
    "Input language unknown": "xmod",
}
"""Part of the sentence → types that get it."""
WHY = {name: why for why, names in REFUSED.items() for name in names.split()}
LOADED = """
    apertus arcee bamba biogpt bitnet bloom codegen cohere cohere2 ctrl deepseek_v3 diffllama doge ernie4_5 exaone4
    falcon falcon_h1 fuyu gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text glm glm4 got_ocr2 gpt2 gpt_bigcode
    gpt_neo gpt_neox gptj granite helium hunyuan_v1_dense internlm3 lfm2 llama minicpm3 ministral mistral mllama mpt
    nanochat nemotron olmo olmo2 olmo3 openai-gpt opt persimmon phi phi3 phi4_multimodal qwen2 qwen3 qwen3_5 seed_oss
    smollm3 stablelm starcoder2 vaultgemma xglm youtu
"""
"""Types that load. One that is in neither list may do either."""


@cache
def outcome(model_type: str) -> LM | str:
    """What comes of a tiny model of the type: the LM, or the sentence that refuses it; skips what cannot be built."""
    try:
        model = tiny(model_type)
    except Exception as error:  # transformers' own, of any kind
        pytest.skip(f"transformers builds no tiny {model_type}: {' '.join(str(error).split())[:200]}")
    try:
        return LM((model, tiny_tokenizer()))
    except ModelError as error:
        return str(error)


@pytest.mark.parametrize("model_type", types())
def test_each_loads_or_is_refused(model_type):
    found = outcome(model_type)
    if isinstance(found, str):
        assert found.startswith("expected a dense decoder") and "\n" not in found
        assert model_type not in LOADED.split(), found
        assert WHY.get(model_type, "because") in found
        return
    assert model_type not in WHY
    bare = found.score(["The capital of Peru is"], ["Lima"])
    with found.patched(some_patch(found, layers=(0,), size=1.0)):
        assert found.score(["The capital of Peru is"], ["Lima"]) != bare
    assert found.score(["The capital of Peru is"], ["Lima"]) == bare


def test_most_types_are_built_and_as_many_as_before_load():
    found, unbuilt = [], []
    for model_type in types():
        try:
            found.append(outcome(model_type))
        except pytest.skip.Exception:
            unbuilt.append(model_type)
    loaded = sum(isinstance(one, LM) for one in found)
    assert loaded >= 85 and len(unbuilt) <= len(found) // 10, (loaded, unbuilt)
