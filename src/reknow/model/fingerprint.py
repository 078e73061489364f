"""What identifies a base model: structure, tokenizer and a sample of its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from reknow.errors import PatchError
from reknow.progress import progress

_SAMPLES = 4096
"""How many weights are compared."""

_ROUNDING = {"float64": 0.0, "float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Largest relative error of a weight cast to this dtype, as float32 has it; of others nothing is known."""


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Structure and tokenizer as hashes, weights as samples, so that a patch made in fp32 fits the bf16 copy."""

    structure: str
    tokenizer: str
    dtype: str
    samples: Tensor  # (about SAMPLES,) float32

    @classmethod
    def of(cls, model: nn.Module, tokenizer) -> Fingerprint:
        """The fingerprint of the model as it is: take it with no patch applied."""
        tied = getattr(model, "all_tied_weights_keys", None) or {}  # offloaded ones are two
        named = sorted((name, p) for name, p in model.named_parameters() if name not in tied)
        structure = [type(model).__name__, [(name, list(p.shape)) for name, p in named]]
        generator = torch.Generator().manual_seed(0)
        each = max(1, _SAMPLES // len(named))
        samples = []
        for name, parameter in named:
            places = torch.randint(parameter.numel(), (each,), generator=generator)
            samples.append(_read(model, name, places))
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are settings of a call, not of the vocabulary.
        words = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
        dtype = str(named[0][1].dtype).removeprefix("torch.")
        return cls(_hash(structure), _hash(words), dtype, torch.cat(samples))

    @property
    def digest(self) -> str:
        """A short name that is the same for the same weights in the same dtype."""
        return _hash([self.structure, self.tokenizer, self.dtype, self.samples.tolist()])

    def check(self, other: Fingerprint, label: str) -> None:
        """Raises PatchError, which says what differs, where `other` is of another model than this one."""
        problem = self.difference(other)
        if problem:
            alike = other.structure == self.structure  # as a GGUF file of the same model is
            raise PatchError(
                f"expected the base model on which {label} was made; this one has {problem}: load that model, or "
                "apply it all the same, at your own risk, with force=True (reknow apply --force)"
                + ("; a GGUF file of that model gets it by `reknow export --to gguf --base FILE`" if alike else "")
            )

    def difference(self, other: Fingerprint) -> str | None:
        """What tells the two models apart, or None."""
        if other.structure != self.structure or other.samples.shape != self.samples.shape:
            return "other layers or sizes"
        if other.tokenizer != self.tokenizer:
            return "another tokenizer"
        rounding = 0.0
        if other.dtype != self.dtype:
            rounding = sum(_ROUNDING.get(dtype, 0.0) for dtype in (other.dtype, self.dtype))
        # Half precision flushes the smallest weights: an absolute term of the same relative size covers them.
        allowed = rounding * (torch.maximum(self.samples.abs(), other.samples.abs()) + 1e-4)
        if bool(((self.samples - other.samples).abs() <= allowed).all()):
            return None
        return "other weights"


def _read(model: nn.Module, name: str, places: Tensor) -> Tensor:
    """Some numbers of the parameter as float32 on the CPU; it is brought into memory and unpacked if need be."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module):
        parameter = getattr(module, leaf).detach()
        if type(parameter) is not Tensor and hasattr(parameter, "dequantize"):  # torchao's
            parameter = parameter.dequantize()
        return parameter.flatten()[places.to(parameter.device)].float().cpu()


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def weight_bits(model: nn.Module) -> dict[str, str]:
    """A hash of the bits of every parameter and buffer in memory, by name; quantised ones as they are stored."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with progress.stage("reading every bit of the weights"):
        return {name: tensor_bits(t.detach()) for name, t in tensors.items() if t.device.type != "meta"}


def tensor_bits(tensor: Tensor) -> str:
    """A hash of a tensor's bits, of a quantised one as it is stored."""
    return hashlib.blake2b(b"".join(map(_bytes, _stored(tensor))), digest_size=16).hexdigest()


def _stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors in which a tensor is kept: itself, or what one of torchao's consists of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [tensor] if flatten is None else [part for name in flatten()[0] for part in _stored(getattr(tensor, name))]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
