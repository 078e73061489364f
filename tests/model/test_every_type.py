"""Every type of causal language model of the installed transformers loads, or is refused in one sentence."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from conftest import some_patch
from every_type import tiny, types
from families import tiny_tokenizer
from reknow import LM
from reknow.errors import ModelError

pytestmark = pytest.mark.slow

EXPERTS = "that are fused in a way that is not known"
NO_MLP = "no matrices from the hidden state into the MLP were found"
PADDING = "padding changes its logits"
REFUSED = {
    EXPERTS: "jetmoe llama4 llama4_text longcat_flash",
    NO_MLP: """
        bert big_bird electra falcon_mamba mamba mamba2 megatron-bert nemotron_h roberta rwkv xlm-roberta xlnet zamba
        zamba2
    """,
    PADDING: "bart blenderbot marian mbart pegasus plbart recurrent_gemma trocr whisper xlstm",
    "its blocks hand on several states for a token": "deepseek_v4 gemma3n_text",
    "its tokens see later ones": "prophetnet",
    "no list of 16 blocks was found": "hrm_text",
    "Input language unknown": "xmod",
}
"""Part of the sentence → types that get it."""
WHY = {name: why for why, names in REFUSED.items() for name in names.split()}
LOADED = """
    afmoe apertus arcee aria_text axk2 bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe ctrl deepseek_v2
    deepseek_v3 diffllama doge dots3_note_text ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 flex_olmo
    fuyu gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text glm glm4 glm4_moe glm4_moe_lite got_ocr2 gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 internlm3 jamba lfm2 lfm2_moe llama minicpm3 minimax minimax_m2 ministral
    mistral mixtral mllama mpt nanochat nemotron olmo olmo2 olmo3 olmoe openai-gpt opt persimmon phi phi3
    phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_next seed_oss smollm3
    solar_open stablelm starcoder2 vaultgemma xglm youtu
"""
"""Types that load. One that is in neither list may do either."""


SEEING_REFUSED = {
    "its tokens see later ones": "paligemma",
    "missing 1 required positional argument: 'pixel_values'": "blip blip-2",
    EXPERTS: "llama4",
}
SEEING = """
    aria aya_vision gemma3 gemma4 idefics3 internvl kosmos-2.5 lfm2_vl llava llava_next llava_onevision mistral3
    mllama qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe
"""
"""Vision-language types whose text decoder is edited."""


@cache
def outcome(model_type: str, kind: Any = AutoModelForCausalLM) -> LM | str:
    """What comes of a tiny model of the type: the LM, or the sentence that refuses it; skips what cannot be built."""
    try:
        model = tiny(model_type, kind)
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
        assert_one_sentence(found)
        assert model_type not in LOADED.split(), found
        assert WHY.get(model_type, "because") in found
        return
    assert model_type not in WHY
    assert_it_takes_a_patch(found)


def assert_one_sentence(refusal: str) -> None:
    assert refusal.startswith("expected a decoder with attention and an MLP") and "\n" not in refusal


def assert_it_takes_a_patch(lm: LM) -> None:
    bare = lm.score(["The capital of Peru is"], ["Lima"])
    with lm.patched(some_patch(lm, layers=(0,), size=1.0)):
        assert lm.score(["The capital of Peru is"], ["Lima"]) != bare
    assert lm.score(["The capital of Peru is"], ["Lima"]) == bare


@pytest.mark.parametrize("model_type", [*SEEING.split(), *" ".join(SEEING_REFUSED.values()).split()])
def test_what_reads_images_too_is_edited_through_its_text_decoder_or_refused(model_type):
    found = outcome(model_type, AutoModelForImageTextToText)
    if isinstance(found, str):
        assert_one_sentence(found)
        (why,) = (why for why, names in SEEING_REFUSED.items() if model_type in names.split())
        assert why in found
        return
    assert model_type in SEEING.split()
    assert all("language_model" in name or "text_model" in name for name in found.parts.value)
    assert_it_takes_a_patch(found)


def test_most_types_are_built_and_as_many_as_before_load():
    found, unbuilt = [], []
    for model_type in types():
        try:
            found.append(outcome(model_type))
        except pytest.skip.Exception:
            unbuilt.append(model_type)
    loaded = sum(isinstance(one, LM) for one in found)
    assert loaded >= 120 and len(unbuilt) <= len(found) // 10, (loaded, unbuilt)
