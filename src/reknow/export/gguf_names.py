"""What a matrix of transformers is called in a GGUF file, and in which order its rows lie there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from reknow.errors import PatchError
from reknow.lm import LM

_ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "llama": "llama",
    "mistral": "llama",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""Model type of transformers → architecture of llama.cpp, of those whose layout is known."""
_AS_THEY_ARE = ("ffn_down", "ffn_up", "ffn_gate", "attn_output", "attn_v")
"""Matrices whose rows lie in a GGUF file as transformers has them, of every architecture above."""
_ROTATED = ("attn_q", "attn_k")
"""Those whose rows llama.cpp's converter puts in another order where the architecture is `llama`."""


@dataclass(frozen=True)
class Place:
    """Where a matrix lies in a GGUF file."""

    tensor: str
    heads: int = 0
    """How many heads the rows are rearranged for; 0: they are as transformers has them."""

    def arrange(self, rows: Tensor) -> Tensor:
        """Rows of transformers in the order of the file: of each head those of the two halves in turn. (out, …)"""
        if not self.heads:
            return rows
        parts = rows.reshape(self.heads, 2, rows.shape[0] // self.heads // 2, *rows.shape[1:])
        return parts.swapaxes(1, 2).reshape(rows.shape)


def llama_cpp_name(lm: LM) -> str:
    """The architecture of llama.cpp that the model belongs to.

    Raises:
        PatchError: its names or layout there are not known.
    """
    kind = lm.model.config.get_text_config(decoder=True).model_type
    if kind not in _ARCHITECTURES:
        raise PatchError(
            f"expected a model whose layout in llama.cpp is known ({', '.join(_ARCHITECTURES)}); {lm.name} is of the "
            f"type {kind}: export a checkpoint with `--to hf`, and convert that with llama.cpp"
        )
    return _ARCHITECTURES[kind]


def find_places(lm: LM, names: Iterable[str], architecture: str) -> dict[str, Place]:
    """Where the matrices of these names lie in a file of the architecture.

    Raises:
        PatchError: it has no such tensor, or its layout is not known.
    """
    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise _unknown(lm, architecture, "it")
    table = gguf.get_tensor_name_map(known[architecture], lm.layers)
    return {name: _place(lm, name, table, architecture) for name in names}


def _place(lm: LM, name: str, table: gguf.TensorNameMap, architecture: str) -> Place:
    found = table.get_name(re.sub(r"\blanguage_model\.", "", name))
    kind = (found or "").rpartition(".")[2]
    if found is None or architecture not in _ARCHITECTURES.values():
        raise _unknown(lm, architecture, name)
    if kind in _ROTATED and architecture == "llama":
        config = lm.model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
        return Place(f"{found}.weight", heads)
    if kind in (*_AS_THEY_ARE, *_ROTATED) or (kind == "attn_qkv" and architecture in ("gpt2", "phi3")):
        return Place(f"{found}.weight")
    raise _unknown(lm, architecture, name)


def _unknown(lm: LM, architecture: str, name: str) -> PatchError:
    return PatchError(
        f"expected matrices whose place in a GGUF file is known; of {architecture} that of {name} of {lm.name} is "
        "not: export a checkpoint with `--to hf`, and convert that with llama.cpp"
    )


def as_rows(tensor: Tensor) -> Tensor:
    """A tensor for `gguf`: float32, on the CPU, its rows one after the other."""
    return tensor.detach().to("cpu", torch.float32).contiguous()
