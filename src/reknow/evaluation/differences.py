"""What somebody else's edit changed: weights that differ from the base's, by how much, and whose facts they concern.

ΔW = W' − W is all that is known of it. Its rank is the number of its singular values that stand out of what rounding
makes. Methods that locate facts write ΔW = Λ (C⁻¹k)ᵀ (ROME, arXiv 2202.05262, eq. 2): ΔW k_s = Λ kᵀC⁻¹k_s has the
product of their key with that of a subject s in the metric of C, in which keys of different subjects are nearly
orthogonal. So what is compared is how much ΔW adds to what W puts out at each subject, ‖ΔW k_s‖ / ‖W k_s‖, for which
neither C nor the method's name is needed.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from reknow.datasets.text import text_source
from reknow.editing.contexts import text_contexts
from reknow.editing.keys import Subjects
from reknow.edits import Edit
from reknow.errors import InputError, ModelError
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.fingerprint import tensor_bits
from reknow.model.parts import groups, is_matrix, reorient, stored_weight
from reknow.model.sources import is_gguf
from reknow.patching.weights import takes_changes
from reknow.progress import progress

__all__ = [
    "MOST_RANK",
    "Concerned",
    "Difference",
    "Inspection",
    "WeightChange",
    "inspect_weights",
    "read_and_close",
    "subject_keys",
]

_Found = TypeVar("_Found")

MOST_RANK = 64
"""Up to which ranks are counted."""
_SPARE = 8
"""Singular values beyond these that are looked for too, so that the last ones are right."""
_GRAINS = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes in which a checkpoint may have been written."""
_UNEVEN = 2.0
"""How far singular values of a GGUF file's rounding may lie above those of numbers of equal size: 1.7 times where an
edit had raised the steps of some blocks (SmolLM2, Q8_0)."""
_CONTEXTS = ((5, 10),)
"""How many texts a subject is read behind, and of how many tokens. A short one by itself has another key: of 200
subjects the edited one came first in 78 of 80 edits without them, and in 80 with them (docs/log.md)."""
_MORE_SUBJECTS = 4
"""Beyond as many as the rank of a change, to show how far they stand out."""


@dataclass(frozen=True)
class Concerned:
    """A subject, and what a change adds where it is spoken of."""

    subject: str
    relative: float
    """‖ΔW k‖ / ‖W k‖, k the base's key at the subject's last token."""


@dataclass(frozen=True)
class Difference:
    """How one tensor differs from the base's."""

    tensor: str
    shape: tuple[int, ...]
    norm: float
    """‖ΔW‖, Frobenius."""
    relative: float | None
    """‖ΔW‖ / ‖W‖; None where W is 0."""
    rank: int | None
    """How many singular values of ΔW are larger than rounding's, up to `MOST_RANK`; None: it is no matrix. 0: nothing
    stands out of what a GGUF file's blocks round away."""
    subjects: tuple[Concerned, ...] = ()
    """Of a change of a value matrix whose rank is below `MOST_RANK`: those that it adds most to, first."""


@dataclass(frozen=True)
class Inspection:
    """A model beside its base."""

    tensors: int
    """How many were compared."""
    differences: tuple[Difference, ...]
    """Of those that differ by more than rounding to a dtype; the largest relative norm first, and those of which
    nothing stands out of a GGUF file's rounding last."""


def inspect_weights(
    open_edited: Callable[[], LM], open_base: Callable[[], LM], subjects: Sequence[str] = ()
) -> Inspection:
    """Compares two models by their weights; one of them is in memory at a time, and of the other what differs.

    Two tensors are the same where the base's, rounded to the dtype in which all numbers of the other's fit, has its
    bits: a copy in half precision is no edit.

    Args:
        open_edited: opens the edited model.
        open_base: opens its base, which is done twice.
        subjects: those among whom a change's own are looked for.

    Raises:
        InputError: they are no models of the same tensors.
        ModelError: one has weights that are not plain numbers in memory, or NaN or infinity where they differ.
    """
    known = read_and_close(open_base, lambda lm: {name: _Known(tensor) for name, tensor in _weights(lm).items()})
    changed, in_blocks = read_and_close(open_edited, lambda lm: (_changed(lm, known), _is_gguf(lm)))
    if not changed:
        return Inspection(len(known), ())
    base, found = open_base(), list[Difference]()
    keys, weights = subject_keys(base, subjects) if subjects else None, _weights(base)
    for name in progress.each("comparing", [*changed], unit="tensors"):
        found.append(_compare(base, name, changed.pop(name), weights[name], keys, subjects, in_blocks))
    found.sort(key=lambda one: (one.rank == 0, -(math.inf if one.relative is None else one.relative)))
    return Inspection(len(known), tuple(found))


def subject_keys(lm: LM, subjects: Sequence[str]) -> Subjects:
    """The subjects, by themselves and behind beginnings of texts, over which keys are means, as ROME's are."""
    edits = [Edit("{}", subject=subject, target_new="?") for subject in subjects]
    return Subjects(lm, edits, text_contexts(lm, _CONTEXTS, text_source(None)))


def read_and_close(open_model: Callable[[], LM], read: Callable[[LM], _Found]) -> _Found:
    """What is read of a model, which is out of memory afterwards."""
    found = read(open_model())
    gc.collect()  # its modules and what hooks them refer to each other
    return found


class _Known:
    """What is kept of a tensor of the base until it is opened again."""

    def __init__(self, tensor: Tensor):
        self.shape = tuple(tensor.shape)
        self.bits = {grain: tensor_bits(tensor.to(grain)) for grain in _GRAINS}


class WeightChange:
    """How far a model's weights are from its base's, where the two are in memory one after the other.

    Tensors are the same as for `inspect_weights`. Of the base those that differ are kept, on the CPU; where they are
    more than a quarter of all numbers, as after a fine-tune of everything, none are.

    Args:
        edited: the model that is compared, in memory first, and again for `largest`.
    """

    def __init__(self, edited: LM):
        self._grains: dict[str, tuple[torch.dtype, str]] | None = None
        """Of each tensor the dtype in which its numbers fit, and its bits there; None: they cannot be told."""
        self._kept: dict[str, Tensor] = {}
        with suppress(ModelError):  # quantised, or a memory beside the weights
            fitting = {name: (_grain(tensor), tensor) for name, tensor in _weights(edited).items()}
            self._grains = {name: (grain, tensor_bits(t.to(grain))) for name, (grain, t) in fitting.items()}

    def keep(self, base: LM) -> None:
        """Keeps what differs of the base, which is in memory now."""
        weights: dict[str, Tensor] = {}
        with suppress(ModelError):
            weights = _weights(base)
        if self._grains is None or weights.keys() != self._grains.keys():
            self._grains = None
            return
        room = sum(tensor.numel() for tensor in weights.values()) // 4
        for name, tensor in weights.items():
            grain, bits = self._grains[name]
            rounded = tensor.to("cpu", grain)
            if tensor_bits(rounded) != bits:
                self._kept[name] = rounded.clone()
                room -= tensor.numel()
            if room < 0:
                self._grains, self._kept = None, {}
                return

    def largest(self, edited: LM) -> float | None:
        """The largest ‖ΔW‖ / ‖W‖ of all matrices that differ; None where none does, or where it cannot be told."""
        if self._grains is None:
            return None
        weights, found = _weights(edited), []
        for name, before in self._kept.items():
            if before.dim() > 1 and before.shape == weights[name].shape:
                base = exact(before)
                found.append(float((exact(weights[name].cpu()) - base).norm()) / max(float(base.norm()), 1e-300))
        return max(found, default=None)


def _grain(tensor: Tensor) -> torch.dtype:
    """The dtype in which all numbers of the tensor fit."""
    return next((g for g in _GRAINS if torch.equal(tensor.to(g).to(tensor.dtype), tensor)), tensor.dtype)


def _weights(lm: LM) -> dict[str, Tensor]:
    """All parameters by name."""
    for name, module in lm.model.named_modules():
        if is_matrix(module) and not takes_changes(module):
            raise ModelError(
                f"expected plain weights in memory; {lm.name} has {name} quantised, offloaded or adapted: give the "
                "model before that was done, or with its adapters merged"
            )
    if beside := [patch.label for patch in lm.patches if patch.kind != "weights"]:
        raise ModelError(
            f"expected a model that is its weights; {lm.name} has a memory beside them ({beside[0]}): reknow show "
            "says what it holds"
        )
    return {name: parameter.detach() for name, parameter in lm.model.named_parameters()}


def _changed(lm: LM, known: Mapping[str, _Known]) -> dict[str, Tensor]:
    """Copies of the tensors that are not the base's, on the CPU, in the dtype in which their numbers fit."""
    weights = _weights(lm)
    _check_same_tensors(lm, weights, known)
    changed = {}
    for name, tensor in progress.each("reading", [*weights.items()], unit="tensors"):
        grain = _grain(tensor)
        kept = tensor.to("cpu", grain, copy=True)
        if tensor_bits(kept) != known[name].bits.get(grain):
            changed[name] = kept
    return changed


def _check_same_tensors(lm: LM, weights: Mapping[str, Tensor], known: Mapping[str, _Known]) -> None:
    """Raises InputError where the models are not built alike."""
    problems = [f"has no {name}" for name in known if name not in weights]
    problems += [f"has {name}, which the base has not" for name in weights if name not in known]
    problems += [
        f"has {name} of {_by(tensor.shape)}, the base of {_by(known[name].shape)}"
        for name, tensor in weights.items()
        if name in known and tuple(tensor.shape) != known[name].shape
    ]
    if problems:
        more = f", and {len(problems) - 1} more differences" if len(problems) > 1 else ""
        raise InputError(
            f"expected a model of the base's tensors; {lm.name} {problems[0]}{more}: name the base that it was made "
            "from"
        )


def _by(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))


def _is_gguf(lm: LM) -> bool:
    return is_gguf(Path(lm.name).expanduser())


def _compare(
    base: LM,
    name: str,
    edited: Tensor,
    weight: Tensor,
    keys: Subjects | None,
    subjects: Sequence[str],
    in_blocks: bool,
) -> Difference:
    """How one tensor differs."""
    rounded = exact(weight.to(edited.dtype))
    change = exact(edited.to(rounded.device)) - rounded
    if not bool(change.isfinite().all()):
        raise ModelError(f"expected finite weights; {name} has NaN or infinity in one of the models: mend that one")
    norm, size = float(change.norm()), float(rounded.norm())
    rank, module = None, _module_of(base, name)
    stored = base.model.get_submodule(module)
    if groups(stored) > 1:  # as the one matrix that the experts of a layer are
        change, rounded = reorient(stored, change), reorient(stored, rounded)
    if change.dim() == 2:
        blocks = in_blocks and edited.dtype == torch.float32  # else the numbers fit half precision
        rank = _rank(change, rounded, None if blocks else torch.finfo(edited.dtype).eps)
    concerned: tuple[Concerned, ...] = ()
    if keys is not None and rank and rank < MOST_RANK and module in base.parts.value:
        k = keys.keys(base.parts.value.index(module)).to(change.device)  # (subjects, in)
        matrices = [each if groups(stored) > 1 else reorient(stored, each) for each in (change, rounded)]
        added, output = ((k @ matrix.T).norm(dim=1) for matrix in matrices)  # (subjects,)
        relative = added / output.clamp(min=torch.finfo(output.dtype).tiny)
        first = relative.argsort(descending=True)[: rank + _MORE_SUBJECTS].tolist()
        concerned = tuple(Concerned(subjects[int(i)], float(relative[i])) for i in first)
    return Difference(name, tuple(edited.shape), norm, norm / size if size else None, rank, concerned)


def _module_of(lm: LM, name: str) -> str:
    """Name of the module whose matrix the parameter of that name is: one that stands in for experts, or its own."""
    parameter = lm.model.get_parameter(name)
    joined = (value for value in lm.parts.value if groups(lm.model.get_submodule(value)) > 1)
    own = name.rpartition(".")[0]
    return next((value for value in joined if stored_weight(lm.model.get_submodule(value)) is parameter), own)


def _rank(change: Tensor, weight: Tensor, eps: float | None) -> int:
    """How many singular values stand out of rounding's, up to `MOST_RANK`.

    In either matrix an entry was rounded by eps |w| / √12; of independent numbers of such sizes the largest singular
    value is about the longest row's norm plus the longest column's (Bandeira, van Handel 2016, arXiv 1408.6185).
    Without eps, after rounding in blocks whose steps are not known, what is left of ΔW without its first singular
    values tells how large that rounding is: numbers of equal size s have s (√rows + √columns), `_UNEVEN` times that
    is allowed for blocks of uneven steps.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)  # it multiplies by random vectors
        values: Any = torch.svd_lowrank(change, q=min(MOST_RANK + _SPARE, *change.shape), niter=4)[1]
    if eps is not None:
        sizes = (weight.abs() + change.abs()) * (eps / math.sqrt(6))
        floor = sizes.norm(dim=0).max() + sizes.norm(dim=1).max()
    else:
        left = (change.norm().square() - (values.square().cumsum(0) - values.square())).clamp(min=0).sqrt()
        floor = left * _UNEVEN * sum(1 / math.sqrt(size) for size in change.shape)  # of each value and those below it
    return min(MOST_RANK, int((values > floor).long().cumprod(0).sum()))
