"""The change ΔW of one matrix, (out, in): thin factors while they are smaller than the matrix, else the matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reknow.files.schema import FormatError
from reknow.files.tensors import check_tensor
from reknow.model.exact import exact

__all__ = [
    "Delta",
    "Dense",
    "LowRank",
    "add_deltas",
    "as_delta",
    "check_factors",
    "delta_tensors",
    "factorize",
    "read_deltas",
    "sum_deltas",
]


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix as a product: `left @ right`, of shape (out, in)."""

    left: Tensor  # (out, rank)
    right: Tensor  # (rank, in)

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def dense(self) -> Tensor:
        """The matrix itself, in float64. (out, in)"""
        return exact(self.left) @ exact(self.right)

    def norm(self) -> float:
        """Frobenius norm, without forming the matrix."""
        left, right = exact(self.left), exact(self.right)
        gram = (left.T @ left) * (right @ right.T)
        return float(gram.sum().clamp(min=0).sqrt())


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix as itself, of shape (out, in)."""

    matrix: Tensor  # (out, in)

    @property
    def rank(self) -> int:
        return min(self.matrix.shape)

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def dense(self) -> Tensor:
        """The matrix itself, in float64. (out, in)"""
        return exact(self.matrix)

    def norm(self) -> float:
        """Frobenius norm."""
        return float(exact(self.matrix).norm())


Delta = LowRank | Dense
"""A change ΔW of one matrix; always seen as (out, in), whatever way round the model stores it."""


def _factors_are_smaller(rank: int, out: int, inside: int) -> bool:
    """Whether a matrix (out, in) takes more memory than its factors of this rank."""
    return rank * (out + inside) < out * inside


def as_delta(left: Tensor, right: Tensor) -> Delta:
    """leftᵀ right as a change: its factors while they are smaller than the matrix. (n, out), (n, in) → (out, in)"""
    if _factors_are_smaller(len(left), left.shape[1], right.shape[1]):
        return LowRank(left.T.float().contiguous(), right.float().contiguous())
    return Dense((left.T @ right).float())


def sum_deltas(deltas: Sequence[Delta]) -> Delta:
    """Σ ΔW: the factors of all side by side while they are smaller than the matrix."""
    out, inside = deltas[0].shape
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) == len(deltas) and _factors_are_smaller(sum(d.rank for d in factors), out, inside):
        return LowRank(*_joined(factors, factors[0].left.device))
    return Dense(add_deltas(torch.zeros(out, inside, dtype=torch.float64), deltas).float())


def add_deltas(base: Tensor, deltas: Sequence[Delta]) -> Tensor:
    """base + Σ ΔW in base's dtype and on its device; the factors of all low-rank changes in one product. (out, in)"""
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if factors:
        left, right = _joined(factors, base.device)
        base = torch.addmm(base, left.to(base), right.to(base))
    for delta in deltas:
        if isinstance(delta, Dense):
            base = base + delta.matrix.to(base)
    return base


def _joined(factors: Sequence[LowRank], device: torch.device) -> tuple[Tensor, Tensor]:
    """One product that is the sum of all, on this device. (out, ranks), (ranks, in)"""
    left, right = zip(*((delta.left.to(device), delta.right.to(device)) for delta in factors), strict=True)
    return torch.cat(left, 1), torch.cat(right, 0)


def factorize(delta: Delta, limit: int) -> tuple[LowRank, float]:
    """The change as factors of rank `limit` at most, and the share of its Frobenius norm that is lost."""
    if isinstance(delta, LowRank) and delta.rank <= limit:
        return LowRank(delta.left.float(), delta.right.float()), 0.0
    u, s, vh = torch.linalg.svd(delta.dense(), full_matrices=False)
    # What float32 cannot tell from zero is no rank.
    rank = min(limit, int((s > s[0] * 1e-7).sum().clamp(min=1)))
    root = s[:rank].sqrt()
    lost = float(s[rank:].norm() / s.norm().clamp(min=1e-300))
    return LowRank((u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float()), lost


# --- among the tensors of a file --------------------------------------------------------------------------


def delta_tensors(deltas: Mapping[str, Delta]) -> dict[str, Tensor]:
    """The changes by matrix name as tensors `delta.NAME.dense`, or `.left` and `.right`."""
    tensors = {}
    for name, delta in deltas.items():
        if isinstance(delta, LowRank):
            tensors |= {f"delta.{name}.left": delta.left, f"delta.{name}.right": delta.right}
        else:
            tensors[f"delta.{name}.dense"] = delta.matrix
    return tensors


def read_deltas(tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    """What `delta_tensors` gave.

    Raises:
        FormatError: a part is missing, the parts do not fit, or there are others.
    """
    deltas: dict[str, Delta] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix("delta.").rpartition(".")
        if not key.startswith("delta.") or not name or part not in ("dense", "left", "right"):
            raise FormatError(f"tensor {key[:80]}: a patch has none of this name")
        if part == "dense":
            if f"delta.{name}.left" in tensors:
                raise FormatError(f"{name} is changed by a matrix and by factors")
            deltas[name] = Dense(check_tensor(key, tensor, "float", 2))
        else:
            deltas[name] = check_factors(name, tensors, f"delta.{name}.left", f"delta.{name}.right")
    return deltas


def check_factors(name: str, tensors: Mapping[str, Tensor], left: str, right: str) -> LowRank:
    """ΔW of the matrix `name` as the product of the tensors `left` and `right`.

    Raises:
        FormatError: one is missing, or they are of different rank.
    """
    first, second = (check_tensor(part, tensors.get(part), "float", 2) for part in (left, right))
    if first.shape[1] != second.shape[0]:
        raise FormatError(f"the factors of {name} have ranks {first.shape[1]} and {second.shape[0]}")
    return LowRank(first, second)
