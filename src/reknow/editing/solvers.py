"""The least-squares core: one change of a matrix that gives many keys new values and spares what it must not touch.

The editors of this family solve one problem in different metrics B (in, r):

    ΔW = Rᵀ X,   X = K B (Bᵀ(KᵀK + K_pᵀK_p)B + λI)⁻¹ Bᵀ

with a key per row of K, a wanted change of its output per row of R, and the keys K_p of earlier edits.

* C = E[k kᵀ] of general text, B Bᵀ = C⁻¹: RᵀK(λC + KᵀK)⁻¹. MEMIT (arXiv 2210.07229, eq. 14) and PMET; EMMET
  (2403.14236) with λ = ridge × scale of C; ROME for one key and λ = 0.
* P the projector on the directions that general text does not use, B Bᵀ = P: AlphaEdit (2410.02355, eq. 14).

λ has no meaning of its own: the share of its change that a key gets by itself is |Bᵀk|² / (|Bᵀk|² + λ). So λ is given
as regularization × mean |Bᵀk|², which depends neither on the size of the model nor on the unit of the keys.
All in float64; of a large C the factor is float32, and what is solved with it is refined in float64 (`refined`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from reknow.editing.refined import Refined
from reknow.errors import EditFailed, InputError
from reknow.model.exact import exact, exact_device
from reknow.patching.deltas import LowRank

_log = logging.getLogger(__name__)


def cholesky(covariance: Tensor) -> Tensor:
    """Lower L with L Lᵀ = C, float64; a singular C (dead units) gets the smallest ridge that helps. (in, in)

    C itself is left as it is, and L is the only other matrix in memory.
    """
    factor, failed = _columns(covariance), torch.empty((), dtype=torch.int32, device=exact_device(covariance.device))
    scale = factor.diagonal().mean()
    for ridge in (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
        if ridge:
            factor.copy_(covariance)
            factor.diagonal().add_(ridge * scale)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            if ridge:
                _log.warning("the covariance is singular: solved with a ridge of %g of its mean diagonal", ridge)
            return factor
    raise InputError("expected a positive covariance matrix; got one that is not: compute it again from more text")


def _columns(matrix: Tensor) -> Tensor:
    """A copy in float64, column after column in memory, as LAPACK works in place."""
    place = exact_device(matrix.device)
    return torch.empty(matrix.mT.shape, dtype=torch.float64, device=place).mT.copy_(matrix)


@dataclass(frozen=True)
class Whitening:
    """B = L⁻ᵀ for L of `cholesky(C)`, so that B Bᵀ = C⁻¹ and |Bᵀk|² says how unusual a key is: in on average over
    general text. It is never written out: keys @ B and rows @ Bᵀ are solved for, from L alone.
    """

    factor: Tensor
    """Lower (in, in) for B, its transpose for Bᵀ."""
    upper: bool = False

    @property
    def T(self) -> Whitening:
        return Whitening(self.factor.T, not self.upper)

    def __rmatmul__(self, rows: Tensor) -> Tensor:
        """rows @ B. rows and result: (any, in), float64"""
        return torch.linalg.solve_triangular(self.factor, rows.T, upper=self.upper).T

    def solve(self, keys: Tensor) -> Tensor:
        """C⁻¹ k for every key. keys: (facts, in); result: (facts, in), float64."""
        return exact(keys) @ self @ self.T


class Basis(Protocol):
    """B (in, r), or what multiplies like it: a matrix, a `Whitening`, that of a mixture."""

    @property
    def T(self) -> Any: ...

    def __rmatmul__(self, rows: Tensor, /) -> Tensor: ...


def solve(factor: Tensor, keys: Tensor) -> Tensor:
    """C⁻¹ k for every key, from `cholesky(C)`. keys: (facts, in); result: (facts, in), float64."""
    return Whitening(factor).solve(keys)


def rank_one(u: Tensor, key: Tensor, residual: Tensor) -> LowRank:
    """residual uᵀ / (uᵀ key): the change along u that maps `key` to `residual`. u, key: (in,); residual: (out,)."""
    return LowRank((residual / (u @ key))[:, None].float(), u[None].float())


def null_space(covariance: Tensor, share: float, threshold: float | None = None) -> Tensor:
    """Orthonormal directions that general text hardly uses. (in, r), float64

    Args:
        share: the weakest directions, of which all together carry at most this share of the trace of C. A single
            direction that carries more than all others, that of an attention sink, is not counted in the trace.
        threshold: the paper's rule instead: eigenvalue below this number.

    Raises:
        InputError: no direction qualifies.
    """
    vectors = _columns(covariance)
    values = vectors.new_empty(len(vectors))
    torch.linalg.eigh(vectors, out=(values, vectors))  # ascending
    values.clamp_(min=0)
    others = values[:-1].sum()
    trace = others if 0 < others < values[-1] else values.sum()
    weak = values < threshold if threshold is not None else values.cumsum(0) <= share * trace
    if not bool(weak.any()):
        rule = f"an eigenvalue below {threshold}" if threshold is not None else f"{share:g} of the trace"
        raise InputError(
            f"expected directions that general text hardly uses ({rule}); the smallest eigenvalue is "
            f"{float(values[0]):.3g} of {float(trace):.3g}: raise the "
            "limit (null_share or null_threshold)"
        )
    return vectors[:, weak]


def least_squares(
    basis: Basis | Refined | None,
    keys: Tensor,
    *,
    regularization: float = 0.0,
    weight: float | None = None,
    past: Tensor | None = None,
    names: Sequence[str] = (),
) -> Tensor:
    """X of this module's equation: the keys' side of ΔW.

    Args:
        basis: B, (in, r); None: the identity; of a large C what solves with it.
        keys: (facts, in).
        regularization: λ in units of the keys' mean |Bᵀk|².
        weight: λ itself, as papers give it.
        past: (past facts, in), keys whose outputs must stay.
        names: how to call the facts in an error.

    Returns:
        (facts, in), float64.

    Raises:
        EditFailed: two keys are the same and λ is 0, or a key has no part in the metric.
    """
    if isinstance(basis, Refined):
        return _least_squares_refined(basis, exact(keys), regularization, weight, past, names)
    mine = exact(keys) if basis is None else exact(keys) @ basis  # (facts, r)
    size = mine.square().sum(1).mean()
    weight = float(regularization * size) if weight is None else weight
    rows = mine
    if past is not None:
        others = exact(past).to(mine.device)
        rows = torch.cat([mine, others if basis is None else others @ basis])
    # The smaller of two systems that are equal: (Z Zᵀ + λ)⁻¹ Z = Z (Zᵀ Z + λ)⁻¹.
    dual = len(rows) <= rows.shape[1]
    system = rows @ rows.T if dual else rows.T @ rows
    system.diagonal().add_(weight)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed or not bool(factor.diagonal().min() > 1e-7 * factor.diagonal().max()):
        raise _singular(mine, names, held=past is not None)
    if dual:
        wanted = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)[:, : len(mine)]
        found = torch.cholesky_solve(wanted, factor).T @ rows
    else:
        found = torch.cholesky_solve(mine.T, factor).T
    return found if basis is None else found @ basis.T


def _least_squares_refined(
    basis: Refined,
    keys: Tensor,
    regularization: float,
    weight: float | None,
    past: Tensor | None,
    names: Sequence[str],
) -> Tensor:
    """`least_squares` where C⁻¹ alone is known: with Z the keys and those of the past and U = Z C⁻¹, X is what
    (U Zᵀ + λI)⁻¹ U has for the keys."""
    rows = keys if past is None else torch.cat([keys, exact(past).to(keys.device)])
    solved = basis.solve(rows)  # (rows, in)
    system = solved @ rows.T
    system = (system + system.T) / 2
    size = system.diagonal()[: len(keys)].mean()
    system.diagonal().add_(float(regularization * size) if weight is None else weight)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed or not bool(factor.diagonal().min() > 1e-7 * factor.diagonal().max()):
        raise _singular(keys, names, held=past is not None)
    return torch.cholesky_solve(solved, factor)[: len(keys)]


def _singular(keys: Tensor, names: Sequence[str], *, held: bool) -> EditFailed:
    """The error for keys that cannot be told apart; names the two most alike. held: some of earlier edits are too."""
    unit = torch.nn.functional.normalize(keys)
    alike = (unit @ unit.T).fill_diagonal_(-1)
    first, second = divmod(int(alike.argmax()), len(alike))
    pair = [repr(names[i]) if names else f"fact {i}" for i in sorted((first, second))]
    alone = "its key may be that of an earlier edit" if held else "its key vanishes"
    about = f"the keys of {pair[0]} and {pair[1]} are the most alike" if len(keys) > 1 else alone
    return EditFailed(
        f"expected facts with different keys; the system of {len(keys)} is singular, and {about}: "
        "raise the regularization, or the plain number (l2, covariance_weight, ridge) that is read in its place, or "
        "leave one of them out"
    )
