"""The principal directions of a matrix's own weights, which a change can spare.

SPHERE (Liu, Gu, Yao, Wang, Peng 2025, arXiv 2510.01172): models break in sequences where the rows of a matrix, its
neurons, lose their even spread over directions. With Ŵ the rows of W (out, in) at length 1 and U the strongest
eigenvectors of ŴᵀŴ / out, as many as carry the share η of its trace, an edit's ΔW becomes

    ΔW (I − α U Uᵀ)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from reknow.model.exact import exact
from reknow.patching.deltas import Delta, Dense, LowRank

__all__ = ["principal_directions", "spare_directions"]


def principal_directions(weight: Tensor, share: float) -> Tensor:
    """U: the first direction with which the strongest ones carry more than `share` of the trace, and those before it.

    Args:
        weight: W. (out, in)

    Returns:
        (in, r), float64, orthonormal.
    """
    rows = normalize(exact(weight), dim=1)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))  # ascending
    carried = values.flip(0).cumsum(0) / values.sum()
    return vectors[:, -min(int((carried <= share).sum()) + 1, len(values)) :]


def spare_directions(change: Delta, directions: Tensor, suppression: float) -> Delta:
    """ΔW (I − α U Uᵀ). directions: U, (in, r); suppression: α"""

    def spared(rows: Tensor) -> Tensor:
        wide = exact(rows)
        return (wide - suppression * (wide @ directions) @ directions.T).to(rows)

    if isinstance(change, LowRank):
        return LowRank(change.left, spared(change.right))
    return Dense(spared(change.matrix))
