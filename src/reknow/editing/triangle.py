"""A symmetric matrix as its lower triangle, in blocks of rows: half the memory, half the work of summing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reknow.model.exact import exact_device

ROWS = 256
"""Rows of a block."""


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

    def to(self, to: torch.device | torch.dtype) -> Triangle:
        return Triangle([block.to(to) for block in self.blocks])

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


def block_shapes(width: int) -> list[tuple[int, int]]:
    """Shapes of the blocks of a (width, width) matrix."""
    return [(min(ROWS, width - start), min(start + ROWS, width)) for start in range(0, width, ROWS)]


def kept_bytes(width: int) -> int:
    """What the triangle of a (width, width) matrix takes in float32."""
    return 4 * sum(rows * columns for rows, columns in block_shapes(width))
