"""Solutions with a large covariance: a Cholesky factor in float32, refined by conjugate gradients in float64.

The factor L of C takes 4 · in² bytes and loses C's weakest directions to rounding. So it only preconditions: the
equations x C = k that are solved are those of C itself, whose triangle of 2 · in² bytes is multiplied block by block
in float64.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from reknow.editing.triangle import Triangle
from reknow.errors import InputError
from reknow.model.exact import exact

__all__ = ["Refined"]

_log = logging.getLogger(__name__)

_RIDGES = (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
"""What is added to C, in units of its mean diagonal, where it is singular (dead units): the smallest that helps."""
_FACTOR_RIDGES = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""The same for what is factorised in float32."""
_CLOSE, _MOST = 1e-8, 300
"""‖k − x C‖ / ‖k‖ at which a solution is one, and steps until another ridge is tried."""


@dataclass(frozen=True)
class Refined:
    """C⁻¹ of a large C."""

    covariance: Triangle
    """C, float32."""
    factor: Tensor
    """Lower L with L Lᵀ ≈ C, float32. (in, in)"""

    @classmethod
    def of(cls, covariance: Triangle) -> Refined:
        """Raises InputError where C is not positive."""
        failed = torch.empty((), dtype=torch.int32, device=covariance.blocks[0].device)
        for ridge in _FACTOR_RIDGES:
            factor = covariance.full().mT  # column after column in memory, as LAPACK works in place
            factor.diagonal().add_(ridge * factor.diagonal().mean())
            torch.linalg.cholesky_ex(factor, out=(factor, failed))
            if not failed and bool(factor.diagonal().isfinite().all()):
                return cls(covariance, factor)
        raise InputError(
            "expected a positive covariance matrix; got one that is not: compute it again from more text"
        )

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return self.factor.nbytes + sum(block.nbytes for block in self.covariance.blocks)

    def solve(self, keys: Tensor) -> Tensor:
        """C⁻¹ k for every key. keys: (facts, in); result: (facts, in), float64.

        Raises:
            InputError: C is not positive.
        """
        wanted = exact(keys)
        scale = exact(torch.cat([block[:, -block.shape[0] :].diagonal() for block in self.covariance.blocks])).mean()
        for ridge in _RIDGES:
            if (found := self._descend(wanted, float(ridge * scale))) is not None:
                if ridge:
                    _log.warning("the covariance is singular: solved with a ridge of %g of its mean diagonal", ridge)
                return found
        raise InputError(
            "expected a positive covariance matrix; got one that is not: compute it again from more text"
        )

    def _descend(self, wanted: Tensor, ridge: float) -> Tensor | None:
        """x with x (C + ridge) = wanted, by preconditioned conjugate gradients; None where they do not get there."""
        tiny = torch.finfo(torch.float64).tiny
        length = wanted.norm(dim=1).clamp(min=tiny)
        found = torch.zeros_like(wanted)
        missing, along = wanted.clone(), self._precondition(wanted)
        drop = (missing * along).sum(1)  # (facts,)
        for _ in range(_MOST):
            running = missing.norm(dim=1) > _CLOSE * length
            if not bool(running.any()):
                return found
            product = along @ self.covariance + ridge * along
            curvature = (along * product).sum(1)
            if bool((curvature[running] <= 0).any()):
                return None
            step = torch.where(running, drop / curvature.clamp(min=tiny), 0.0)[:, None]
            found += step * along
            before, missing = missing, missing - step * product
            towards = self._precondition(missing)
            # Polak and Ribière's, since a factor in float32 is never quite the same.
            turn = ((missing - before) * towards).sum(1) / drop.clamp(min=tiny)
            drop = (missing * towards).sum(1)
            along = towards + turn[:, None] * along
        return None

    def _precondition(self, rows: Tensor) -> Tensor:
        """rows (L Lᵀ)⁻¹ in float32, each brought to length 1 on the way. (facts, in), float64"""
        length = rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        half = torch.linalg.solve_triangular(
            self.factor, (rows / length).float().to(self.factor.device).T, upper=False
        )
        solved = torch.linalg.solve_triangular(self.factor.T, half, upper=True).T
        return exact(solved).to(rows.device) * length
