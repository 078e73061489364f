"""Safetensors files that are read once and for all: checked before memory is taken, copied, and sealed by a digest.

Nothing that is read stays a view on its file, so the file may be replaced or cut while its tensors are in use. The
header of ours is one JSON text in the file's metadata; beside it stands the SHA-256 of that text and of all tensors.
Files without a digest, as they were written before there was one, are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from reknow.files.atomic import atomic_write
from reknow.files.schema import FormatError, Object, Strict, check_regular, first_problem, parse_json
from reknow.progress import progress

_Form = TypeVar("_Form", bound=Strict)
_HEADER, _DIGEST = "reknow", "sha256"
_MOST_HEADER = 10**8
"""Bytes of a header, as the format has it."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_Offset = Annotated[int, Field(ge=0, lt=2**63)]


class _Place(Strict):
    """Where a tensor lies in its file."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0, lt=2**40)]] = Field(max_length=8)
    data_offsets: Annotated[list[_Offset], Field(min_length=2, max_length=2)]

    @classmethod
    def of(cls, name: str, value: Any) -> _Place:
        """Raises FormatError where the value is none."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise FormatError(f"tensor {name[:80]}: {first_problem(error)}") from None


class Sealed(NamedTuple):
    """What a file holds."""

    metadata: dict[str, str]
    """All texts of the file."""
    tensors: dict[str, Tensor]

    def header(self, form: type[_Form]) -> _Form:
        """Our header; raises FormatError where there is none of that form, or a tensor has NaN or infinity."""
        header = parse_json(form, self.metadata.get(_HEADER, ""), once=True)
        check_finite(self.tensors)
        return header


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    header: Mapping[str, Any] | None = None,
) -> Path:
    """Writes tensors and texts with their digest; an old file stays until the new one is whole.

    Args:
        header: what `Sealed.header` gives again, as JSON values.
    """
    metadata = {**(metadata or {}), **({} if header is None else {_HEADER: json.dumps(header)})}
    # Cloned where memory is shared, as by tied embeddings: safetensors refuses that.
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    owners: dict[int, str] = {}
    for name, tensor in kept.items():
        if owners.setdefault(tensor.untyped_storage().data_ptr(), name) != name and tensor.numel():
            kept[name] = tensor.clone()
    texts = {**metadata, _DIGEST: digest(metadata, kept)}
    with progress.stage(f"writing {Path(path).name}"):
        return atomic_write(path, lambda new: save_file(kept, new, metadata=texts))


def digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of texts and tensors, whatever the order in which the file has them."""
    sha256 = hashlib.sha256()
    for name, text in sorted(metadata.items()):
        if name != _DIGEST:
            sha256.update(f"{name}\0{text}\0".encode())
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha256.update(_bytes(tensor))
    return sha256.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """The memory of a tensor on the CPU as a writable buffer."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def read_tensors(path: str | Path) -> Sealed:
    """What a file holds; memory is taken for as many bytes as it has.

    Raises:
        OSError: it cannot be read.
        FormatError: it is no safetensors file, or not the one that was written.
    """
    with open(check_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise FormatError("it is no safetensors file, or cut short")
        header = parse_json(Object, file.read(length), once=True)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise FormatError("its metadata are no texts")
        places = {name: _Place.of(name, value) for name, value in header.items()}
        _check_places(places, size - 8 - length)
        tensors = {}
        ordered = sorted(places.items(), key=lambda item: item[1].data_offsets)
        for name, place in progress.each(f"reading {Path(path).name}", ordered, unit="tensors"):
            tensors[name] = torch.empty(place.shape, dtype=_DTYPES[place.dtype])
            if tensors[name].numel() and file.readinto(_bytes(tensors[name])) != tensors[name].nbytes:
                raise FormatError("it was cut short while it was read")
    if _DIGEST in metadata and digest(metadata, tensors) != metadata[_DIGEST]:
        raise FormatError("its content is not what was written: a part of it was changed or damaged")
    return Sealed(metadata, tensors)


def _check_places(places: Mapping[str, _Place], size: int) -> None:
    """Raises FormatError where tensors do not lie one behind the other in `size` bytes."""
    at = 0
    for name, place in sorted(places.items(), key=lambda item: item[1].data_offsets):
        if place.dtype not in _DTYPES:
            raise FormatError(f"tensor {name}: its numbers are of the kind {place.dtype[:20]!r}, which is not known")
        end = at + math.prod(place.shape) * _DTYPES[place.dtype].itemsize
        if place.data_offsets != [at, end]:
            raise FormatError(f"tensor {name}: its place in the file does not fit its size")
        at = end
    if at != size:
        raise FormatError(f"expected {at} bytes of tensors, got {size}")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises FormatError where a tensor has NaN or infinity."""
    for name, tensor in tensors.items():
        numbers = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # of eight bits only few things are asked
        if tensor.is_floating_point() and not bool(numbers.isfinite().all()):
            raise FormatError(f"tensor {name}: it has NaN or infinity")


def check_tensor(name: str, tensor: Tensor | None, kind: str, dimensions: int) -> Tensor:
    """The tensor itself; raises FormatError where it is missing, or its kind of number or its dimensions are others.

    Args:
        kind: `float` for any with a fraction, or the name of a dtype.
    """
    if tensor is None:
        raise FormatError(f"the tensor {name} is missing")
    if not (tensor.is_floating_point() if kind == "float" else str(tensor.dtype) == f"torch.{kind}"):
        raise FormatError(f"tensor {name}: expected numbers of the kind {kind}, got {tensor.dtype}")
    if tensor.dim() != dimensions:
        raise FormatError(f"tensor {name}: expected {dimensions} dimensions, got {tensor.dim()}")
    return tensor
