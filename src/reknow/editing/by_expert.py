"""The covariance of a mixture's keys: of each expert's by itself.

The key of a mixture has a part for every expert (`reknow.model.experts`), 65,536 numbers in OLMoE. How the parts of
two experts vary together is left out of C: it is in a block for each expert, of 1,024 there, and C⁻¹k has numbers for
the experts alone that k reaches. So what a method writes for a key lies in the experts to which its token is routed.

The mean is over all tokens, those of other experts count as 0: an expert that general text seldom reaches has a small
block, and takes more of a change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from reknow.editing.solvers import Whitening, cholesky
from reknow.editing.triangle import PairedTriangle, Triangle, block_shapes, kept_bytes, zeros
from reknow.model.exact import exact

__all__ = ["Covariance", "Diagonal", "ExpertWhitening", "bytes_kept", "from_blocks", "shapes", "zero_sums"]

_RIDGE = 1e-3
"""What is added to the block of every expert, in mean diagonals of all blocks. What text never reached would else
take all of a change."""


class Diagonal:
    """A symmetric matrix with nothing but blocks on its diagonal, of one size each, as their triangles.

    Args:
        parts: of each expert.
    """

    def __init__(self, parts: Sequence[Triangle]):
        self.parts = list(parts)

    @property
    def blocks(self) -> list[Tensor]:
        """Those of all triangles."""
        return [block for part in self.parts for block in part.blocks]

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """The part of each expert. rows: (any, width)"""
        return rows.chunk(len(self.parts), 1)

    def add_products(self, keys: Tensor) -> None:
        """Adds Σ k kᵀ. keys: (any, width)"""
        for part, own in zip(self.parts, self.split(keys), strict=True):
            part.add_products(exact(own[(own != 0).any(1)]))

    def __len__(self) -> int:
        """Rows of the whole matrix."""
        return sum(map(len, self.parts))

    def to(self, to: torch.device | torch.dtype) -> Diagonal:
        return Diagonal([part.to(to) for part in self.parts])

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Makes every block what `change` says of it, float64."""
        for part in self.parts:
            part.map(change)

    def mean(self, count: int) -> Diagonal:
        """The sum by `count` in float32; this one is used up."""
        return Diagonal([self.parts.pop(0).mean(count) for _ in range(len(self.parts))])

    def full(self) -> Tensor:
        """The whole matrix. (width, width)"""
        return torch.block_diag(*(part.full() for part in self.parts))

    def named(self, name: str) -> dict[str, Tensor]:
        """The blocks as tensors of a file."""
        return {f"{name}.{i}": block for i, block in enumerate(self.blocks)}


Covariance = Triangle | Diagonal
"""C of a dense layer, or of a mixture."""


def zero_sums(width: int, groups: int, device: torch.device) -> Triangle | PairedTriangle | Diagonal:
    """Sums of a (width, width) matrix, all 0, of which so many blocks are kept."""
    if groups == 1:
        return zeros(width, device)
    return Diagonal([Triangle.zeros(width // groups, device) for _ in range(groups)])


def shapes(width: int, groups: int) -> list[tuple[int, int]]:
    """Shapes of the blocks of such a matrix, in order."""
    return block_shapes(width // groups) * groups


def bytes_kept(width: int, groups: int) -> int:
    """What such a matrix takes in float32."""
    return groups * kept_bytes(width // groups)


def from_blocks(blocks: Sequence[Tensor], groups: int) -> Covariance:
    """The matrix of these blocks."""
    each = len(blocks) // groups
    parts = [Triangle(blocks[start : start + each]) for start in range(0, len(blocks), each)]
    return parts[0] if groups == 1 else Diagonal(parts)


@dataclass(frozen=True, eq=False)
class ExpertWhitening:
    """`Whitening` of a mixture's C; an expert's block is factorised when a key first reaches it."""

    covariance: Diagonal
    factors: dict[int, Tensor] = field(default_factory=dict)
    """Of those that were reached, by number. (inner, inner)"""
    transposed: bool = False

    @property
    def T(self) -> ExpertWhitening:
        return replace(self, transposed=not self.transposed)

    @property
    def nbytes(self) -> int:
        """What it takes in memory once keys have reached all experts; a cache asks before any has."""
        factors = sum(len(part) ** 2 for part in self.covariance.parts) * 8  # of float64
        return factors + sum(block.nbytes for block in self.covariance.blocks)

    def __rmatmul__(self, rows: Tensor) -> Tensor:
        """rows @ B. rows and result: (any, in), float64"""
        parts = []
        for i, own in enumerate(self.covariance.split(rows)):
            if bool((own != 0).any()):
                basis = Whitening(self._factor(i))
                own = own @ (basis.T if self.transposed else basis)
            parts.append(own)
        return torch.cat(parts, 1)

    def solve(self, keys: Tensor) -> Tensor:
        """C⁻¹ k for every key. keys: (facts, in); result: (facts, in), float64."""
        return exact(keys) @ self @ self.T

    def _factor(self, expert: int) -> Tensor:
        if expert not in self.factors:
            diagonals = [block[:, -block.shape[0] :].diagonal() for block in self.covariance.blocks]
            own = exact(self.covariance.parts[expert].full())
            own.diagonal().add_(_RIDGE * exact(torch.cat(diagonals)).mean())
            self.factors[expert] = cholesky(own)
        return self.factors[expert]
