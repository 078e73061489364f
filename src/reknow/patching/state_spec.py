"""What a method keeps in its patches besides ΔW: names, shapes and kinds of numbers, checked when a file is read.

    StateSpec({"keys": "float keys in", "down.*": "float blocks rank in.*"}, memory=VersionFields)

A tensor is described by its kind of number and its dimensions. Dimensions of one name agree, over all tensors and the
fields of `memory` that are counted by it; `edits` are the patch's edits, `out.NAME` and `in.NAME` the sizes of a
matrix that it changes. A star stands for a part of the name, in the dimensions too. What a model's matrices must be
for a memory to fit them is checked by `check_matrix`, when the memory is put in use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from reknow.errors import PatchError
from reknow.files.schema import FormatError, Strict, first_problem
from reknow.files.tensors import check_tensor
from reknow.model.decoder import Decoder
from reknow.patching.record import PatchRecord

_ANY = "…"
"""Stands for any dimensions in a description."""


class CountedBy(NamedTuple):
    """Marks a field of a memory that has an entry for each thing of a dimension, or is their number."""

    dimension: str


class _NoFields(Strict):
    """A version that knows nothing besides its tensors."""


@dataclass(frozen=True)
class StateSpec:
    """The tensors and the memory of a method's patches."""

    tensors: Mapping[str, str] = field(default_factory=dict)
    """Name, with a question mark behind where it may be missing and a star for a part of it → its description."""
    memory: type[Strict] = _NoFields
    """The fields of `Patch.memory`, what a version knows besides its tensors."""
    settings: tuple[str, ...] = ()
    """Fields of the method that are dimensions of that name."""
    alike: tuple[str, ...] = ("modules",)
    """Fields of `memory`, and tensors, that all versions of a memory share, where they have them."""

    def check(
        self,
        state: Mapping[str, Tensor],
        memory: Mapping[str, Any],
        settings: Mapping[str, Any],
        sizes: dict[str, int],
    ) -> None:
        """Raises FormatError where a patch keeps something else.

        Args:
            sizes: dimensions that are known already.
        """
        described = {name.rstrip("?"): text for name, text in self.tensors.items()}
        for name in (name for name in self.tensors if "*" not in name and "?" not in name):
            check_tensor(name, state.get(name), *_parts(described[name])[:2])
        for name, tensor in state.items():
            pattern, part = _pattern(name, described)
            kind, count, dimensions = _parts(described[pattern])
            check_tensor(name, tensor, kind, tensor.dim() if dimensions == [_ANY] else count)
            if dimensions != [_ANY]:
                for dimension, size in zip(dimensions, tensor.shape, strict=True):
                    _agree(sizes, dimension.replace("*", part), size, f"tensor {name}")
        try:
            known = self.memory.model_validate(memory)
        except ValidationError as error:
            raise FormatError(f"memory: {first_problem(error)}") from None
        for name, about in self.memory.model_fields.items():
            for mark in (mark for mark in about.metadata if isinstance(mark, CountedBy)):
                value = getattr(known, name)
                _agree(sizes, mark.dimension, value if isinstance(value, int) else len(value), f"memory.{name}")
        for name in self.settings:
            if name in sizes:
                _agree(sizes, name, settings.get(name), f"settings.{name}")

    def check_versions(self, patches: Sequence[PatchRecord]) -> None:
        """Raises PatchError where patches that are to be versions of one memory differ in what is `alike` in all."""
        first = patches[0]
        for patch, name in product(patches[1:], self.alike):
            own, wanted = ({**each.state, **each.memory}.get(name) for each in (patch, first))
            if isinstance(own, Tensor) and isinstance(wanted, Tensor):
                own, wanted = torch.equal(own, wanted), True
            if own != wanted:
                raise PatchError(
                    f"expected versions of one memory with the same {name}; got another in {patch.label} than in "
                    f"{first.label}: make the edit again"
                )


def _parts(description: str) -> tuple[str, int, list[str]]:
    kind, *dimensions = description.split()
    return kind, len(dimensions), dimensions


def _pattern(name: str, described: Mapping[str, str]) -> tuple[str, str]:
    """The pattern that describes a tensor, and what stands for its star."""
    for pattern in described:
        if found := re.fullmatch(re.escape(pattern).replace(r"\*", "(.+)"), name, re.DOTALL):
            return pattern, "".join(found.groups())
    raise FormatError(f"tensor {name[:80]}: its method keeps none of this name")


def _agree(sizes: dict[str, int], dimension: str, size: Any, where: str) -> None:
    if sizes.setdefault(dimension, size) != size:
        raise FormatError(f"{where}: expected {sizes[dimension]} ({dimension.partition('.')[0]}), got {size}")


def check_matrix(lm: Decoder, name: str, tensors: Mapping[str, tuple[Tensor, int]]) -> None:
    """Raises PatchError where `name` is no matrix of an MLP of the model, or of other sizes than the tensors.

    Args:
        tensors: "in" or "out" → a tensor, and which of its dimensions has to be that of the matrix.
    """
    if name not in lm.parts.value and name not in chain.from_iterable(lm.parts.mlp_in):
        raise PatchError(
            f"expected a memory that fits {lm.name}; got one beside {name!r}, which is no matrix of its MLPs: load "
            "the model on which it was made"
        )
    sizes: dict[str, int] = dict(zip(("out", "in"), lm.weight(name).shape, strict=True))
    for side, (tensor, dimension) in tensors.items():
        if tensor.shape[dimension] != sizes[side]:
            raise PatchError(
                f"expected a memory for {name} with {sizes[side]} numbers at its {side}put; got one with "
                f"{tensor.shape[dimension]}: load the model on which it was made"
            )
