"""The null space of general text while edit follows edit: what successors of AlphaEdit change of its P = B Bᵀ.

* BetaEdit (Liu, Liu, Li 2026, arXiv 2605.09285): general text has a little of itself in B too, so what leaks is
  penalised, and B is found anew every τ edits, of general text and of the n edits so far:

    ΔW = R K₁ᵀP (K_p K_pᵀP + K₁K₁ᵀP + λ₁CP + λ₂I)⁻¹,   P of (K_p K_pᵀ / n + λ₁C) / (1 + λ₁)

* EvoEdit (Lyu et al. 2025, arXiv 2510.13851): P loses what an edit has used, P ← P − Q Qᵀ with Q an orthonormal basis
  of P K₁, so that no later edit touches it.

With B turned so that Bᵀ C B is a diagonal S, BetaEdit's is the least-squares core in the metric B (λ₁S + λ₂)^(−1/2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reknow.editing.solvers import null_space
from reknow.errors import EditFailed
from reknow.model.exact import exact

__all__ = ["LeakyNullSpace", "leaky_null_space", "refreshed_with", "remaining"]

_NOTHING = 1e-9
"""Variance of general text, in units of the largest in B, below which a direction has none."""


_NO_DIRECTION = 1e-6
"""Singular values below this, in units of the largest, are the rounding of keys, which patches keep in float32."""


class LeakyNullSpace(NamedTuple):
    """Directions that general text hardly uses, and how much it does."""

    basis: Tensor
    """B, orthonormal. (in, r), float64"""
    leakage: Tensor
    """The diagonal of Bᵀ C B. (r,)"""

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return self.basis.nbytes + self.leakage.nbytes

    def typicality(self, keys: Tensor) -> float:
        """λ₁ at which a key of the mean size, by itself and with λ₂ = 0, gets half of its change. keys: (n, in)"""
        return float(((exact(keys) @ self.basis).square() / self.leakage).sum(1).mean())

    def metric(self, leakage_weight: float, weight: float) -> Tensor:
        """B (λ₁S + λ₂)^(−1/2). (in, r)"""
        return self.basis / (leakage_weight * self.leakage + weight).sqrt()


def leaky_null_space(
    covariance: Tensor, share: float, threshold: float | None = None, protected: Tensor | None = None
) -> LeakyNullSpace:
    """The null space of `protected`, by default of C itself, as `solvers.null_space` finds it, with what it has of C.

    Args:
        covariance: C. (in, in)
        protected: (in, in)
    """
    basis = null_space(covariance if protected is None else protected, share, threshold)
    leakage, turn = torch.linalg.eigh(basis.T @ exact(covariance) @ basis)
    return LeakyNullSpace(basis @ turn, leakage.clamp(min=_NOTHING * float(leakage[-1])))


def refreshed_with(made: Sequence[int], every: int) -> int:
    """How many edits the newest null space knows: those before the last patch at which `every` were new.

    Args:
        made: edits of each earlier patch.
    """
    known = count = 0
    for more in (*made, 0):
        known = count if count - known >= every else known
        count += more
    return known


def remaining(basis: Tensor, past: Tensor) -> Tensor:
    """The directions of a null space that are orthogonal to earlier keys. basis: (in, r); past: (n, in)

    Returns:
        (in, r − rank), float64, orthonormal if `basis` is.

    Raises:
        EditFailed: none is left.
    """
    used = exact(past.to(basis.device)) @ basis  # (n, r)
    turn, triangle = torch.linalg.qr(used.T, mode="complete")
    # Edits of one key have one direction: those of the span, and then the rest.
    within, lengths, _ = torch.linalg.svd(triangle[: len(used)])
    rank = int((lengths > _NO_DIRECTION * lengths[0]).sum())
    if rank >= basis.shape[1]:
        raise EditFailed(
            f"expected directions that neither general text nor an earlier edit uses; {len(used):,} edits have used "
            f"all {basis.shape[1]:,}: raise null_share, or take betaedit, which shares them"
        )
    spanned = turn[:, : len(within)] @ within
    return basis @ torch.cat([spanned[:, rank:], turn[:, len(within) :]], 1)
