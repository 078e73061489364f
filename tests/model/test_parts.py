"""The adapter finds the parts of every family, and what it says of them holds in a forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from conftest import close, make_lm
from families import CORE_FAMILIES, FAMILIES, ROPE, slow_but, tiny_model, tiny_tokenizer
from reknow import LM
from reknow.errors import ModelError
from reknow.model.parts import find_parts, shape
from reknow.model.tokens import Text
from reknow.patching.deltas import LowRank
from reknow.patching.weights import Weights

LLAMA = ("model", "layers", "norm", "mlp.down_proj", "mlp.gate_proj mlp.up_proj", "self_attn.o_proj")
GPT = ("transformer", "h", "ln_f", "mlp.c_proj", "mlp.c_fc", "attn.c_proj")
EXPERTS = ("model", "layers", "norm", "mlp.experts.value_matrix", "", "self_attn.o_proj")
BLOOM = ("transformer", "h", "ln_f", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", "self_attention.dense")
NAMES = dict.fromkeys(FAMILIES, LLAMA) | {
    "gpt2": GPT,
    "gptj": ("transformer", "h", "ln_f", "mlp.fc_out", "mlp.fc_in", "attn.out_proj"),
    "gpt_neo": ("transformer", "h", "ln_f", "mlp.c_proj", "mlp.c_fc", "attn.attention.out_proj"),
    "gpt_neox": (
        "gpt_neox", "layers", "final_layer_norm", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", "attention.dense",
    ),
    "gpt_bigcode": GPT,
    "opt": ("model.decoder", "layers", "final_layer_norm", "fc2", "fc1", "self_attn.out_proj"),
    "bloom": BLOOM,
    "falcon": BLOOM,
    "mpt": ("transformer", "blocks", "norm_f", "ffn.down_proj", "ffn.up_proj", "attn.out_proj"),
    "phi": ("model", "layers", "final_layernorm", "mlp.fc2", "mlp.fc1", "self_attn.dense"),
    "phi3": ("model", "layers", "norm", "mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj"),
    "glm4": ("model", "layers", "norm", "mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj"),
    **dict.fromkeys(("olmoe", "mixtral", "qwen2_moe", "gpt_oss"), EXPERTS),
    "starcoder2": ("model", "layers", "norm", "mlp.c_proj", "mlp.c_fc", "self_attn.o_proj"),
}  # fmt: skip
"""Family → stack, list of blocks, final norm, and in a block: value matrix, MLP inputs, attention's output."""

NOT_IDENTITY = {"gemma2", "gemma3_text", "olmo2", "granite", "glm4"}
"""A norm or a multiplier follows the MLP."""

SHAPES: dict[str, tuple[str, dict]] = {
    "opt-350m": ("opt", dict(word_embed_proj_dim=16, do_layer_norm_before=False)),
    "opt, norm behind": ("opt", dict(do_layer_norm_before=False)),
    "falcon 40b": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon 11b": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)),
    "falcon, ALiBi": ("falcon", dict(alibi=True)),
    "falcon rw": ("falcon", dict(alibi=True, parallel_attn=False, multi_query=False, bias=True)),
    "gpt_neox, blocks in sequence": ("gpt_neox", dict(use_parallel_residual=False)),
    "gpt_bigcode, a head for each": ("gpt_bigcode", dict(multi_query=False)),
    "phi, few rotary dimensions": ("phi", dict(partial_rotary_factor=0.25)),
    "stablelm, parallel": ("stablelm", dict(use_parallel_residual=True)),
    "llama, tied": ("llama", dict(tie_word_embeddings=True)),
    "llama, biases": ("llama", dict(mlp_bias=True, attention_bias=True)),
    "llama, square MLP": ("llama", dict(intermediate_size=32)),
    "gpt2, square MLP": ("gpt2", dict(n_inner=32)),
    "mistral, narrow attention": ("mistral", dict(head_dim=4)),
    "llama, eager": ("llama", dict(attn_implementation="eager")),
    "qwen2_moe, a dense layer": ("qwen2_moe", dict(mlp_only_layers=[1])),
    "mixtral, eager experts": ("mixtral", dict(experts_implementation="eager")),
    "gpt2, tuples": ("gpt2", dict(return_dict=False)),
    "llama, tuples": ("llama", dict(return_dict=False)),
}
"""Variants of the families that differ where an editor looks."""
ALL = {family: (family, {}) for family in FAMILIES} | SHAPES


@pytest.fixture(scope="module")
def built():
    """Every model is built and verified once; tests leave it as they found it."""
    made: dict[str, LM] = {}

    def get(name: str) -> LM:
        if name not in made:
            family, changes = ALL[name]
            made[name] = make_lm(family, **changes)
        return made[name]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_have_these_names(built, family):
    stack, blocks, norm, value, up, out = NAMES[family]
    parts = built(family).parts
    layers = 4 if family == "gpt_neo" else 3
    assert parts.backbone == stack
    assert parts.blocks == tuple(f"{stack}.{blocks}.{i}" for i in range(layers))
    assert parts.final_norm == (f"{stack}.{norm}",)
    assert parts.value == tuple(f"{block}.{value}" for block in parts.blocks)
    assert parts.mlp_in == tuple(tuple(f"{block}.{u}" for u in up.split()) for block in parts.blocks)
    assert parts.attention_out == tuple(f"{block}.{out}" for block in parts.blocks)
    assert parts.hidden_size == 32


@pytest.mark.parametrize("name", ALL)
def test_what_is_measured(built, name):
    parts = built(name).parts
    assert parts.replayable
    behind = ALL[name][0] == "opt" and name != "opt"  # OPT with its norm behind the MLP
    assert parts.residual_identity == (ALL[name][0] not in NOT_IDENTITY and not behind)
    # Granite has a multiplier; behind OPT's norm is the whole stream, where a longer addition counts for more.
    assert parts.value_normed == (ALL[name][0] in NOT_IDENTITY - {"granite"})


@pytest.mark.parametrize("name", ALL)
def test_value_matrices_map_the_mlp_to_the_stream(built, name):
    lm = built(name)
    for value, ups in zip(lm.parts.value, lm.parts.mlp_in, strict=True):
        hidden, inner = lm.weight(value).shape
        assert hidden == lm.parts.hidden_size
        assert {shape(lm.model.get_submodule(up)) for up in ups} <= {(inner, hidden), (2 * inner, hidden)}
        # Both ways round fit a square matrix: the orientation shows in what the module computes.
        module = lm.model.get_submodule(value)
        key = torch.randn(inner)
        bias = 0 if module.bias is None else module.bias
        assert close(lm.weight(value) @ key + bias, module(key[None])[0])


@pytest.mark.parametrize("name", ALL)
def test_a_rank_one_write_gives_the_key_its_value(built, name):
    """W' k* = v* in the module itself, in a forward pass: the equation that every locate-then-edit method solves."""
    lm = built(name)
    layer = lm.layers - 1
    matrix = lm.parts.value[layer]
    (row,) = lm.encode([Text("The mother tongue of Danielle Darrieux is")])
    places = [len(row.ids) - 1]
    before = lm.read([row], places, [matrix], [matrix])
    key, old = before.inputs[matrix][0], before.outputs[matrix][0]
    wanted = torch.randn(len(old), generator=torch.Generator().manual_seed(0))
    base = lm.weight(matrix).clone()
    delta = LowRank((wanted - old)[:, None] / key.square().sum(), key[None])
    lm.weight(matrix).add_(delta.dense().float())
    try:
        after = lm.read([row], places, [matrix], [matrix])
    finally:
        lm.weight(matrix).copy_(base)
    assert close(after.inputs[matrix][0], key), "the key comes from below"
    assert close(after.outputs[matrix][0], wanted)


def test_the_text_part_of_a_multimodal_model():
    text = FAMILIES["gemma3_text"] | dict(vocab_size=320)
    vision = dict(num_hidden_layers=3, hidden_size=32, intermediate_size=64, num_attention_heads=4, image_size=28)
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision | dict(patch_size=14))
    lm = LM((AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer()))
    assert lm.parts.value[0] == "model.language_model.layers.0.mlp.down_proj"
    assert lm.parts.replayable


def test_a_narrow_adapter_behind_the_mlp_is_not_the_value_matrix():
    changes = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=320, vocab_size=320, head_dim=8)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma4_text"](**ROPE | changes)).eval()
    lm = LM((model, tiny_tokenizer()))
    assert lm.parts.value[1] == "model.layers.1.mlp.down_proj"
    assert not lm.parts.residual_identity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", slow_but(CORE_FAMILIES, FAMILIES))
def test_half_precision_is_measured_alike(built, family, dtype):
    model = tiny_model(family).to(dtype)
    lm = LM((model, tiny_tokenizer()))
    assert lm.dtype == dtype
    assert lm.parts == built(family).parts


REFUSED = {
    "llama4_text": (
        ROPE | dict(intermediate_size_mlp=64, num_local_experts=4, head_dim=8),
        "fused in a way that is not known",
    ),
    "mamba": (dict(hidden_size=32, num_hidden_layers=2), "no matrices from the hidden state"),
    "rwkv": (dict(hidden_size=32, num_hidden_layers=2, attention_hidden_size=32), "no matrices from the hidden"),
    "recurrent_gemma": (ROPE | dict(head_dim=8, lru_width=32), "padding changes its logits"),
    "bert": (ROPE, "no matrices from the hidden state"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_unsupported_models_are_refused_in_one_sentence(family):
    settings, why = REFUSED[family]
    config = CONFIG_MAPPING[family](**settings | dict(vocab_size=320))
    with pytest.raises(ModelError, match=why) as refusal:
        LM((AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer()))
    message = str(refusal.value)
    assert (
        message.startswith("expected a decoder with attention and an MLP")
        and "docs/models.md" in message
        and "\n" not in message
    )


def test_an_encoder_decoder_is_refused():
    config = CONFIG_MAPPING["t5"](vocab_size=320, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
    with pytest.raises(ModelError, match="encoder-decoder"):
        LM((AutoModelForSeq2SeqLM.from_config(config), tiny_tokenizer()))


@pytest.mark.parametrize("count", [2, 4])
def test_a_wrong_number_of_layers_is_refused(count):
    model = tiny_model("llama")
    model.config.num_hidden_layers = count
    with pytest.raises(ModelError, match=f"no list of {count} blocks|forward pass over three tokens failed"):
        find_parts(model)


def test_a_model_that_sees_later_tokens_is_refused():
    model = tiny_model("llama", attn_implementation="eager")
    for layer in model.model.layers:
        own = layer.forward
        layer.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs | dict(attention_mask=None))
    with pytest.raises(ModelError, match="see later ones"):
        LM((model, tiny_tokenizer()))


def test_learned_positions_without_position_ids_are_refused():
    model = tiny_model("gpt2")
    own = model.forward

    def forward(input_ids, attention_mask=None, past_key_values=None, use_cache=None, return_dict=None, **options):
        return own(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model.forward = forward
    with pytest.raises(ModelError, match="padding changes its logits"):
        LM((model, tiny_tokenizer()))


def test_weights_that_are_no_numbers_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN or infinity"):
        LM((model, tiny_tokenizer()))


def test_a_model_that_cannot_run_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = nn.Linear(64, 31)
    with pytest.raises(ModelError, match="forward pass over three tokens failed"):
        LM((model, tiny_tokenizer()))


def test_a_weight_that_is_nowhere_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(ModelError, match="in memory or offloaded"):
        Weights(model).current("model.layers.1.mlp.down_proj")


def test_layers_are_checked_at_the_door(lm):
    from reknow.errors import InputError

    assert lm.check_layer(2) == 2
    for layer in (-1, 3, "1", 1.0):
        with pytest.raises(InputError, match="layer from 0 to 2"):
            lm.check_layer(layer)
