"""The matrix that comes nearest to what many edits ask of it, each at the inputs of its own tokens (SimIE).

    min over W of  Σ_i ‖(W − Ŵ_i) K_i‖² + λ ‖W − W₀‖²

Some more edits K, with P the sum of all K Kᵀ and λI, add (Ŵ − W) K times Kᵀ P⁻¹: a rank for each token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reknow.editing.solvers import least_squares
from reknow.model.exact import exact
from reknow.patching.deltas import Delta, LowRank, as_delta

__all__ = ["Compromise"]


class Compromise:
    """W of one matrix, and what it is solved from.

    Args:
        ridge: λ.
        unit: what λ was measured in, for the patch to keep.
        moved: W − W₀ before this call, (out, in), float64.
        before: inputs of the edits before, each (tokens, in), float64.
    """

    def __init__(self, ridge: float, unit: float, moved: Tensor, before: Sequence[Tensor]):
        self.ridge, self.unit = ridge, unit
        self._moved, self._before = moved, list(before)  # (out, in), each (tokens, in)
        self._keys: list[Tensor] = []  # of this call, as what follows; each (tokens, in)
        self._left: list[Tensor] = []  # (tokens, out)
        self._right: list[Tensor] = []  # (tokens, in)

    def take(self, made: Sequence[tuple[Delta, Tensor]], *, from_first: bool) -> None:
        """Solves for some more edits, each with its ΔW and the inputs of its tokens (tokens, in).

        Args:
            from_first: ΔW is Ŵ − W₀, else Ŵ − W.
        """
        asked, keys = torch.cat([_outputs(change, own) for change, own in made]), torch.cat([own for _, own in made])
        left = asked - keys @ self._moved.T if from_first else asked
        past = [*self._before, *self._keys]
        right = least_squares(None, keys, weight=self.ridge, past=torch.cat(past) if past else None)
        self._moved = self._moved + left.T @ right
        self._keys.append(keys)
        self._left.append(left)
        self._right.append(right)

    @property
    def change(self) -> Delta:
        """ΔW of this call."""
        return as_delta(torch.cat(self._left), torch.cat(self._right))

    @property
    def inputs(self) -> Tensor:
        """K of this call, or, of more tokens than the matrix is wide, as many rows as that with the same Σ K Kᵀ.
        (tokens, in), float32"""
        keys = torch.cat(self._keys)
        return (torch.linalg.qr(keys, mode="r")[1] if len(keys) > keys.shape[1] else keys).float()


def _outputs(change: Delta, keys: Tensor) -> Tensor:
    """ΔW k of every key, without the matrix where there are factors. (tokens, in) → (tokens, out), float64, CPU"""
    if isinstance(change, LowRank):
        return keys @ exact(change.right).cpu().T @ exact(change.left).cpu().T
    return keys @ exact(change.matrix).cpu().T
