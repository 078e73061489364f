"""GGUF files of small models, as llama.cpp's converter writes them, and the real llama.cpp that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, quants

from reknow import LM
from reknow.export.gguf_files import GGUFFile, NewTensor
from reknow.export.gguf_match import read_tensor

CONTROL, NORMAL = 3, 1
ARCHITECTURES = {
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "gpt_neox": gguf.MODEL_ARCH.GPTNEOX,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""Type of a model in transformers → what llama.cpp calls it."""


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp has them. (out, in)"""
    parts = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return parts.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(lm: LM, file: Path, kind: str = "F16", **about: str) -> Path:
    """The base model as a GGUF file whose matrices are of this type, and that says of itself what is given.

    As llama.cpp's `convert_hf_to_gguf.py` writes it, whose rules stand in `stored`; written here from that, and not
    with the names and orders that are tested.
    """
    config = lm.model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    for key, text in about.items():
        writer.add_string(f"general.{key.replace('__', '.')}", text)
    _write_config(config, writer)
    _write_tokenizer(lm, writer)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    with lm.unpatched():
        for name, parameter in lm.model.named_parameters():
            data = stored(config, name, parameter.detach().float().numpy().copy())  # written when patches are back
            own = GGMLQuantizationType[kind if data.ndim > 1 and "position" not in name else "F32"]
            new = table.get_name(name, try_suffixes=(".weight", ".bias"))
            assert new is not None, name
            writer.add_tensor(new, quants.quantize(np.ascontiguousarray(data), own), raw_dtype=own)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return file


def stored(config, name: str, data: np.ndarray) -> np.ndarray:
    """The numbers of a parameter of transformers as a GGUF file has them."""
    kind, heads = config.model_type, config.num_attention_heads
    if kind in ("llama", "mistral"):
        for part, count in (("q_proj", heads), ("k_proj", config.num_key_value_heads)):
            if f".{part}." in name:
                return permuted(data, count)
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return data + 1
    if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):  # Conv1D
        return data.T
    if kind == "gpt_neox" and ".query_key_value." in name:  # of each head q, k and v in turn
        parts = data.reshape(heads, 3, data.shape[0] // heads // 3, *data.shape[1:])
        return parts.swapaxes(0, 1).reshape(data.shape)
    return data


def _write_config(config, writer: gguf.GGUFWriter) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    writer.add_feed_forward_length(inner or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)
    for name, add in (
        ("rms_norm_eps", writer.add_layer_norm_rms_eps),
        ("layer_norm_eps", writer.add_layer_norm_eps),
        ("layer_norm_epsilon", writer.add_layer_norm_eps),
        ("use_parallel_residual", writer.add_parallel_residual),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("sliding_window", writer.add_sliding_window),
    ):
        if (value := getattr(config, name, None)) is not None:
            add(value)
    if rope := getattr(config, "rope_parameters", None):
        rope = rope.get("full_attention", rope)  # Gemma 3 has two kinds
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))


def _write_tokenizer(lm: LM, writer: gguf.GGUFWriter) -> None:
    words = json.loads(lm.tokenizer.backend_tokenizer.to_str())
    ids = {**words["model"]["vocab"], **{one["content"]: one["id"] for one in words["added_tokens"]}}
    tokens = sorted(ids, key=ids.__getitem__)
    tokens += [f"<unused{i}>" for i in range(len(tokens), lm.model.config.vocab_size)]
    special = {one["content"] for one in words["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in special else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in words["model"]["merges"]])
    writer.add_bos_token_id(lm.tokenizer.bos_token_id)
    writer.add_eos_token_id(lm.tokenizer.eos_token_id)
    writer.add_add_bos_token(lm.tokenizer("a").input_ids[0] == lm.tokenizer.bos_token_id)


def in_float16(file: Path, new: Path) -> Path:
    """A GGUF file written anew with all its matrices in F16."""
    old = GGUFFile(file)

    def unpacked(name: str) -> np.ndarray:
        return read_tensor(old, name).half().numpy()

    matrices = [name for name, tensor in old.tensors.items() if len(tensor.shape) > 1]
    old.write_with(new, {one: NewTensor(GGMLQuantizationType.F16, partial(unpacked, one)) for one in matrices}, {})
    return new


def llama_cpp(model: Path, *adapters: Path) -> Callable[..., list[str]]:
    """llama.cpp with the model and adapters: a function from prompts to greedy continuations."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 1.0) for file in adapters]
    server = xllamacpp.Server(params)

    def complete(prompts: Sequence[str], tokens: int = 6) -> list[str]:
        asked = dict(max_tokens=tokens, temperature=0.0, n_probs=0)
        return [server.handle_completions({"prompt": p, **asked})["choices"][0]["text"] for p in prompts]

    return complete
