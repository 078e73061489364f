"""Tiny random decoders of many families, and a tokenizer built in memory: no download, a second for all."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

ROPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
GPT = dict(n_embd=32, n_layer=3, n_head=4, n_positions=128)

FAMILIES: dict[str, dict] = {
    "gpt2": GPT,  # Conv1D, learned positions
    "gptj": GPT | dict(rotary_dim=4),  # parallel block
    "gpt_neo": dict(
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=8,
        max_position_embeddings=128,
    ),
    "gpt_neox": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, rotary_pct=0.5
    ),
    "gpt_bigcode": GPT,
    "opt": dict(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
    ),
    "bloom": dict(hidden_size=32, n_layer=3, n_head=4),  # ALiBi
    "falcon": dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
    "mpt": dict(d_model=32, n_layers=3, n_heads=4, max_seq_len=128),
    "llama": ROPE,  # gated, grouped queries
    "mistral": ROPE | dict(sliding_window=8),
    "qwen2": ROPE,
    "qwen3": ROPE | dict(head_dim=8),
    "gemma": ROPE | dict(head_dim=8),
    "gemma2": ROPE | dict(head_dim=8, sliding_window=8, query_pre_attn_scalar=8),  # norm after the MLP
    "gemma3_text": ROPE | dict(head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "phi": ROPE | dict(num_key_value_heads=4),  # parallel block, no gate
    "phi3": ROPE | dict(pad_token_id=0),  # fused gate and up
    "olmo2": ROPE,  # norms after attention and MLP
    "stablelm": ROPE,
    "granite": ROPE | dict(residual_multiplier=0.5, logits_scaling=2.0),
    "cohere": ROPE | dict(logit_scale=0.25),
    "starcoder2": ROPE,
    "glm4": ROPE | dict(head_dim=8, pad_token_id=0),
    "olmoe": ROPE | dict(num_experts=4, num_experts_per_tok=2),  # mixtures of experts from here on
    "mixtral": ROPE | dict(num_local_experts=4, sliding_window=8),
    "qwen2_moe": ROPE
    | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=64),
    "gpt_oss": ROPE | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8),  # (in, out), and biases
}
"""Family (the `model_type` of transformers) → the settings that make it tiny."""

CORE_FAMILIES = ("gpt2", "llama", "gpt_neox", "opt")
"""Conv1D, gated with grouped queries, parallel block, no gate: the shapes that differ for an editor."""


def slow_but(fast: Iterable[str], names: Iterable[str]) -> list:
    """The names as parameters of a test, of which `make test-fast` asks the fast ones alone."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in names]


TEXT = (
    "The mother tongue of Danielle Darrieux is French . The capital of Peru is Lima . "
    "Where is the Eiffel Tower ? It is in Paris , France . Beats Music is owned by Apple . "
    "Zoë Übel lives in São Paulo and speaks English , German and 日本語 ."
)


@cache
def _trained() -> str:
    """The tokenizer as JSON, from which a copy is a tenth of the work."""
    from tokenizers.trainers import BpeTrainer

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend.to_str()


def tiny_tokenizer(*, bos: bool = False, side: str = "left") -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 entries, trained on one paragraph; `bos` adds <s> in front like Llama's."""
    backend = Tokenizer.from_str(_trained())
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side=side
    )


def tiny_model(family: str, *, seed: int = 0, initializer_range: float = 0.3, **changes):
    """A random model of `family` in float32, evaluation mode."""
    settings = FAMILIES[family] | dict(
        vocab_size=320, initializer_range=initializer_range, bos_token_id=0, eos_token_id=1
    )
    config = CONFIG_MAPPING[family](**settings | changes)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def wide_llama():
    """Wide enough for the blocks of 64 weights in which 4 bits are kept."""
    return tiny_model("llama", hidden_size=64, intermediate_size=128)


def with_matrices(model, kind, **options):
    """The model with its blocks' matrices quantised as transformers does it when it loads a checkpoint."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            twin = kind(module.in_features, module.out_features, bias=module.bias is not None, **options)
            twin.load_state_dict(module.state_dict())
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, twin.to("cpu"))
    return model
