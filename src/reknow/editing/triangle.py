"""A symmetric matrix as its lower triangle, in blocks of rows: half the memory, half the work of summing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reknow.model.exact import exact, exact_device

ROWS = 256
"""Rows of a block."""
LARGE = 20_000
"""A matrix with more columns is summed in pairs of float32 and bfloat16, and its factor is float32: one of 28,672, as
in models of 70B, takes 2.5 GB to sum and 4.9 GB to solve with, in place of 3.3 and 9.9."""


class Triangle:
    """Rows i · ROWS to (i + 1) · ROWS of a symmetric matrix are `blocks[i]`, up to the diagonal's block.

    Args:
        blocks: (rows, i · ROWS + rows) each.
    """

    def __init__(self, blocks: Sequence[Tensor]):
        self.blocks = list(blocks)

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> Triangle:
        """The triangle of a (width, width) matrix of zeros, float64."""
        place = exact_device(device)
        return cls([torch.zeros(rows, end, dtype=torch.float64, device=place) for rows, end in block_shapes(width)])

    def add_products(self, keys: Tensor) -> None:
        """Adds Σ k kᵀ. keys: (any, width)"""
        for block in self.blocks:
            rows, end = block.shape
            block.addmm_(keys[:, end - rows : end].T, keys[:, :end])

    def __len__(self) -> int:
        """Rows of the whole matrix."""
        return self.blocks[-1].shape[1]

    def to(self, to: torch.device | torch.dtype) -> Triangle:
        return Triangle([block.to(to) for block in self.blocks])

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Makes every block what `change` says of it, float64."""
        self.blocks = [change(block) for block in self.blocks]

    def mean(self, count: int) -> Triangle:
        """The sum by `count` in float32; this one is used up, block after block."""
        return Triangle([self.blocks.pop(0).div_(count).float() for _ in range(len(self.blocks))])

    def __rmatmul__(self, rows: Tensor) -> Tensor:
        """rows @ C, a block at a time. rows and result: (any, width), float64"""
        product = torch.zeros_like(rows)
        for block in self.blocks:
            wide, start = exact(block), block.shape[1] - block.shape[0]
            product[:, start : block.shape[1]] += rows[:, : block.shape[1]] @ wide.T
            product[:, :start] += rows[:, start : block.shape[1]] @ wide[:, :start]
        return product

    def full(self) -> Tensor:
        """The whole matrix. (width, width)"""
        width = self.blocks[-1].shape[1]
        matrix = self.blocks[0].new_empty(width, width)
        for block in self.blocks:
            rows, end = block.shape
            matrix[:end, end - rows : end] = block.T
            matrix[end - rows : end, :end] = block
            corner = matrix[end - rows : end, end - rows : end]
            corner.copy_(corner.tril() + corner.tril(-1).T)
        return matrix

    def named(self, name: str) -> dict[str, Tensor]:
        """The blocks as tensors of a file."""
        return {f"{name}.{i}": block for i, block in enumerate(self.blocks)}


class PairedTriangle:
    """Sums of a large matrix as pairs of a float32 and a bfloat16: 32 bits of every sum in six bytes, where float64
    has 53 in eight. So an addition errs by 2⁻³³ of the sum, far below the float32 that is kept of it.

    Args:
        high, low: of each block, as in `Triangle`.
    """

    def __init__(self, high: Sequence[Tensor], low: Sequence[Tensor]):
        self.high, self.low = list(high), list(low)

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> PairedTriangle:
        shapes = block_shapes(width)
        high, low = (
            [torch.zeros(*block, dtype=dtype, device=device) for block in shapes]
            for dtype in (torch.float32, torch.bfloat16)
        )
        return cls(high, low)

    def add_products(self, keys: Tensor) -> None:
        """Adds Σ k kᵀ, each block in float64. keys: (any, width), float64"""
        starts = iter(self.high)

        def added(total: Tensor) -> Tensor:
            rows, end = next(starts).shape
            return total.addmm_(keys[:, end - rows : end].T, keys[:, :end])

        self.map(added)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Makes every block what `change` says of its float64 sum."""
        place, largest = exact_device(self.high[0].device), max(high.numel() for high in self.high)
        room = torch.empty(largest, dtype=torch.float64, device=place)  # one for all: blocks are of unlike size
        for high, low in zip(self.high, self.low, strict=True):
            total = room[: high.numel()].view_as(high).copy_(high)
            total = change(total.add_(low.to(place)))
            high.copy_(total)
            low.copy_(total.sub_(high.to(place)))

    def to(self, to: torch.device) -> PairedTriangle:
        return PairedTriangle([block.to(to) for block in self.high], [block.to(to) for block in self.low])

    def mean(self, count: int) -> Triangle:
        """The sum by `count` in float32; this one is used up."""
        self.map(lambda total: total.div_(count))
        high, self.high, self.low = self.high, [], []
        return Triangle(high)

    def named(self, name: str) -> dict[str, Tensor]:
        """The blocks as tensors of a file."""
        both = (("", self.high), (".low", self.low))
        return {f"{name}{part}.{i}": block for part, blocks in both for i, block in enumerate(blocks)}


def zeros(width: int, device: torch.device) -> Triangle | PairedTriangle:
    """Sums of a (width, width) matrix, all 0."""
    return (PairedTriangle if width > LARGE else Triangle).zeros(width, device)


def block_shapes(width: int) -> list[tuple[int, int]]:
    """Shapes of the blocks of a (width, width) matrix."""
    return [(min(ROWS, width - start), min(start + ROWS, width)) for start in range(0, width, ROWS)]


def kept_bytes(width: int) -> int:
    """What the triangle of a (width, width) matrix takes in float32."""
    return 4 * sum(rows * columns for rows, columns in block_shapes(width))
