"""A tiny random model of any type of causal language model that transformers has, from its configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LARGEST = 20_000_000
"""Parameters beyond which a size was not found, and the model is not built."""
LAYERS, HEADS, HIDDEN, INNER, VOCABULARY = 2, 4, 32, 64, 320

SIZES = (
    (HIDDEN, "hidden_size d_model n_embd embedding_size word_embed_proj_dim lru_width"),
    (HIDDEN, "attention_hidden_size width embed_dim"),
    (INNER, "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size dim_ff"),
    (INNER, "decoder_ffn_dim encoder_ffn_dim moe_intermediate_size"),
    (INNER, "shared_expert_intermediate_size expert_ffn_hidden_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads mamba_n_heads"),
    (HEADS, "encoder_attention_heads decoder_attention_heads linear_num_value_heads"),
    (2, "num_key_value_heads num_kv_heads linear_num_key_heads"),
    (8, "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels d_kv"),
    (8, "linear_key_head_dim linear_value_head_dim rotary_dim global_head_dim"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_k top_k_experts"),
    (128, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (8, "sliding_window"),
    (8, "hidden_size_per_layer_input"),
    (4, "laurel_rank"),
    (0, "bos_token_id pad_token_id"),
    (1, "eos_token_id"),
)
"""What makes a configuration small: sizes, and the names of the fields that get them."""
SMALL = {name: size for size, names in SIZES for name in names.split()}

LATENT = """axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa minicpm3 youtu"""
"""Types whose keys and values come from one latent vector, for every head its own."""
ROPES: dict[str, Any] = dict(rope_type="default", rope_theta=1e4)
MORE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": dict(rope_parameters={"full_attention": ROPES}, layer_types=["full_attention"] * LAYERS),
    "dots1": dict(n_shared_experts=1),
    "gemma3n_text": dict(
        num_hidden_layers=5,
        num_kv_shared_layers=0,
        intermediate_size=INNER,
        layer_types=["sliding_attention"] * 4 + ["full_attention"],
        activation_sparsity_pattern=[0.0] * 5,
    ),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "qwen2_vl_text": dict(rope_parameters=ROPES | dict(mrope_section=[1, 1, 2])),
    "qwen2_5_vl_text": dict(rope_parameters=ROPES | dict(mrope_section=[1, 1, 2])),
    "qwen3_vl_moe_text": dict(sliding_window=None),  # which it never reads
    "olmo_hybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "mamba2": dict(head_dim=16, state_size=16, n_groups=2),
    **{name: dict(num_key_value_heads=HEADS) for name in LATENT.split()},
    "axk1": dict(num_key_value_heads=HEADS, n_group=1, topk_group=1),
    "deepseek_v2": dict(num_key_value_heads=HEADS, first_k_dense_replace=1, num_experts_per_tok=2),
    "deepseek_v3": dict(num_key_value_heads=HEADS, first_k_dense_replace=1, n_group=1, topk_group=1),
    "glm4_moe_lite": dict(num_key_value_heads=HEADS, mlp_layer_types=["dense", "sparse"], n_group=1, topk_group=1),
    "reformer": dict(
        is_decoder=True,
        axial_pos_shape=(8, 16),
        axial_pos_embds_dim=(16, 16),
        attention_head_size=8,
        feed_forward_size=INNER,
    ),
    "xlm": dict(emb_dim=HIDDEN),
    "zaya": dict(num_experts_per_tok=1),
}
"""Type → the sizes that hang together there in another way."""


def types() -> list[str]:
    """The model types that transformers opens as causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The type's configuration with every size that it names made small."""
    return _shrunk(CONFIG_MAPPING[model_type])


def _shrunk(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    whole, more = kind(), MORE.get(kind.model_type, {})
    known = whole.to_dict()
    unset = {name for name, value in known.items() if value is None and "experts" not in name}
    changes = {name: size for name, size in SMALL.items() if name in unset or isinstance(known.get(name), int)}
    layers = [known[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in known]
    # A list with one entry per layer ends with the layers.
    lists = {
        name: value[:LAYERS] for name, value in known.items() if isinstance(value, list) and len(value) in layers
    }
    named: dict[str, Any] = getattr(kind, "sub_configs")  # noqa: B009, it has no type that can be read
    parts = {name: type(getattr(whole, name, None)) for name in named}
    shrunk = {name: _shrunk(part) for name, part in parts.items() if issubclass(part, PreTrainedConfig)}
    return kind(**{**changes, **lists, **shrunk, **more})


def tiny(model_type: str, kind: Any = AutoModelForCausalLM):
    """A random model of the type, as that class of transformers opens it; raises where transformers cannot build one,
    or only a large one."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters: a size is known by a name that is not made small")
    torch.manual_seed(0)
    return kind.from_config(config).eval()
