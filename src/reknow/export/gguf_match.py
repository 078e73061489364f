"""Whether a GGUF file is of the model that patches were made on: the matrices that they change are the same there."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from reknow.errors import PatchError
from reknow.export.gguf_files import GGUFFile
from reknow.export.gguf_names import Place, find_places
from reknow.lm import LM

_ROUNDING = ((16, 0.01), (8, 0.03), (6.5, 0.06), (5.4, 0.12), (4.2, 0.25), (3, 0.4), (0, 0.6))
"""From so many bits for each weight on, the largest relative error that quantisation may have made of a matrix; that
of normally distributed weights is a third to a half of it, that of another model 1.4."""


def check_match(lm: LM, file: GGUFFile, names: Iterable[str]) -> dict[str, Place]:
    """Where the matrices of these names lie in the file.

    Raises:
        PatchError: one is not there, of another size, or holds other weights than the base's, whatever quantisation
            has made of them; or its layout is not known.
    """
    places = find_places(lm, names, file.architecture)
    for name, place in places.items():
        tensor, base = file.tensors.get(place.tensor), lm.base_weight(name)
        what = f"expected a GGUF file of {lm.name}, on which the patches were made"
        remedy = "give the file that was made from that model"
        if tensor is None:
            raise PatchError(f"{what}; {file.path} has no tensor {place.tensor}: {remedy}")
        if tuple(reversed([int(size) for size in tensor.shape])) != tuple(base.shape):
            raise PatchError(f"{what}; in {file.path} {place.tensor} has another size: {remedy}")
        base = place.arrange(base.float().cpu())
        error = float((read_tensor(file, place.tensor) - base).norm() / base.norm().clamp(min=1e-30))
        if not error <= allowed_error(tensor.tensor_type):
            raise PatchError(
                f"{what}; {file.path} has other weights in {place.tensor} (they differ by {error:.0%} of their norm, "
                f"more than {tensor.tensor_type.name} explains): {remedy}"
            )
    return places


def allowed_error(kind: GGMLQuantizationType) -> float:
    """The largest relative Frobenius error that rounding to the type may make."""
    block, size = GGML_QUANT_SIZES[kind]
    return next(error for bits, error in _ROUNDING if 8 * size / block >= bits)


def read_tensor(file: GGUFFile, name: str) -> Tensor:
    """A matrix of the file, unpacked. (out, in) float32

    Raises:
        PatchError: it is of a type that the package `gguf` cannot unpack.
    """
    tensor = file.tensors[name]
    try:
        return torch.from_numpy(np.array(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    except NotImplementedError:
        raise PatchError(
            f"expected a tensor that the package gguf can unpack; {name} in {file.path} is of type "
            f"{tensor.tensor_type.name}: give a file of another quantisation"
        ) from None
