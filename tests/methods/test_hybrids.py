"""Methods on models with other mixers than attention in some blocks, and on those that read images too."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from test_contract import EDIT, nll, quick
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from conftest import bits, same
from every_type import tiny_config, types
from families import tiny_tokenizer
from reknow import LM

pytestmark = pytest.mark.slow

TYPES = """
    falcon_h1 granitemoehybrid jamba lfm2_moe minimax olmo_hybrid qwen3_5 qwen3_next
    gemma4 qwen3_vl_moe
"""
"""With linear attention, state spaces or convolutions; with images."""


@cache
def opened(model_type: str) -> LM:
    kind = AutoModelForCausalLM if model_type in types() else AutoModelForImageTextToText
    config = tiny_config(model_type)
    for each in (config, config.get_text_config(decoder=True)):
        each.initializer_range = 0.3  # a tiny model whose weights are small says the same whatever it reads
    torch.manual_seed(0)
    return LM((kind.from_config(config).eval(), tiny_tokenizer()))


@pytest.mark.parametrize("name", ["rome", "alphaedit", "ft-m", "grace"])
@pytest.mark.parametrize("model_type", TYPES.split())
def test_they_are_edited_through_their_text_decoder(model_type, name):
    lm = opened(model_type)
    before, answer = bits(lm), nll(lm, EDIT)
    with lm.patched(quick(name, lm).edit(lm, [EDIT])):
        assert nll(lm, EDIT) < answer - 0.1
    assert same(bits(lm), before)
