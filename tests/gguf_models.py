"""GGUF files of small Llama models, as llama.cpp's converter writes them, and the real llama.cpp that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, quants

from reknow import LM

CONTROL, NORMAL = 3, 1


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp has them. (out, in)"""
    parts = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return parts.swapaxes(1, 2).reshape(rows.shape)


def write_llama(lm: LM, file: Path, kind: str = "F16", **about: str) -> Path:
    """The base model as a GGUF file whose matrices are of this type, and that says of itself what is given."""
    config, writer = lm.model.config, gguf.GGUFWriter(file, "llama")
    for key, text in about.items():
        writer.add_string(f"general.{key.replace('__', '.')}", text)
    _write_config(config, writer)
    _write_tokenizer(lm, writer)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with lm.unpatched():
        for name, parameter in lm.model.named_parameters():
            data = parameter.detach().float().numpy().copy()  # written later, when patches are back
            if ".q_proj." in name:
                data = permuted(data, config.num_attention_heads)
            if ".k_proj." in name:
                data = permuted(data, config.num_key_value_heads)
            stored = GGMLQuantizationType[kind if data.ndim > 1 else "F32"]
            new = table.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(new, quants.quantize(data, stored), raw_dtype=stored)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return file


def _write_config(config, writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


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
    writer.add_add_bos_token(True)


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
