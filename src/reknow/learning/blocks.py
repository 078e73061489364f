"""Parts of the networks that transform gradient factors [u; δ]: statistics, and blocks for matrices of one shape.

MEND's block scales and shifts before the relu, MALMEN's behind it; both are the identity before training, and scale s
and shift o are each matrix's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from reknow.lm import LM
from reknow.model.exact import exact

__all__ = ["MALMENBlock", "MENDBlock", "MatrixGroups", "RunningNorm", "transform_factors"]


class MatrixGroups:
    """Matrices by shape: those of one shape share a network, in which each has an index of its own.

    Attributes:
        shapes: group, such as `4096x1024` → (out, in, how many matrices).
        group: matrix → its group.
        index: matrix → its index in the group.
        scale: matrix → its root mean square, the unit of step sizes.
    """

    def __init__(self, lm: LM, names: Sequence[str]):
        weights = {name: lm.base_weight(name) for name in names}
        self.group = {name: "x".join(map(str, weight.shape)) for name, weight in weights.items()}
        members = {group: [n for n in names if self.group[n] == group] for group in self.group.values()}
        self.index = {name: members[group].index(name) for name, group in self.group.items()}
        self.shapes = {group: (*weights[alike[0]].shape, len(alike)) for group, alike in members.items()}
        self.scale = {name: float(weight.float().square().mean().sqrt()) for name, weight in weights.items()}


class RunningNorm(nn.Module):
    """Mean and standard deviation of all vectors seen so far, to normalise by; updated as by Welford and Chan."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("squares", torch.zeros(size))
        """Σ (x − mean)²."""

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Takes the vectors (n, size) into the statistics."""
        if not len(x):
            return
        x = exact(x)
        mean = x.mean(0)
        self._join(float(len(x)), mean, (x - mean).square().sum(0))

    def joined(self, other: RunningNorm) -> RunningNorm:
        """The statistics of what either has seen."""
        both = copy.deepcopy(self)
        both._join(float(other.count), exact(other.mean), exact(other.squares))
        return both

    @torch.no_grad()
    def _join(self, new: float, mean: Tensor, squares: Tensor) -> None:
        count = float(self.count)
        shift = mean - exact(self.mean)
        # Added in float64 and rounded once.
        self.squares.copy_(exact(self.squares) + (squares + shift.square() * (count * new / (count + new))))
        self.mean.copy_(exact(self.mean) + shift * (new / (count + new)))
        self.count += new

    def forward(self, x: Tensor) -> Tensor:
        """(x − mean) / standard deviation; before two vectors were seen x itself. (n, size)"""
        if float(self.count) < 2:
            return x
        return (x - self.mean) / ((self.squares / (self.count - 1)).sqrt() + 1e-7)


def transform_factors(
    norm: nn.Module, blocks: Iterable[nn.Module], u: Tensor, delta: Tensor, index: int
) -> tuple[Tensor, Tensor]:
    """What blocks make of normalised factors, for the matrix of this index. (n, in), (n, out) → the same"""
    state = norm(torch.cat([u, delta], 1))
    for block in blocks:
        state = block(state, index)
    u, delta = state.split([u.shape[1], delta.shape[1]], 1)
    return u, delta


class MENDBlock(nn.Module):
    """x + relu(s ⊙ (U V x + b) + o)."""

    def __init__(self, size: int, rank: int, matrices: int):
        super().__init__()
        rank = min(rank, size)
        self.left = nn.Parameter(torch.zeros(size, rank))  # U
        # Scaled so that Vx is of order 1: then one learning rate moves U and V alike, whatever the size.
        self.right = nn.Parameter(torch.randn(rank, size) * size**-0.5)  # V
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(matrices, size))
        self.shift = nn.Parameter(torch.zeros(matrices, size))

    def forward(self, x: Tensor, index: int) -> Tensor:
        inner = (x @ self.right.T) @ self.left.T + self.bias
        # A clamp, unlike relu, has a gradient at zero, where all of it starts.
        return x + (inner * self.scale[index] + self.shift[index]).clamp(min=0)


class MALMENBlock(nn.Module):
    """x + s ⊙ relu(A B x + b) + o."""

    def __init__(self, size: int, rank: int, matrices: int):
        super().__init__()
        rank = min(rank, size)
        self.down = nn.Parameter(torch.randn(size, rank))
        self.up = nn.Parameter(torch.zeros(rank, size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(matrices, size))
        self.shift = nn.Parameter(torch.zeros(matrices, size))

    def forward(self, x: Tensor, index: int) -> Tensor:
        # A clamp, unlike relu, has a gradient at zero, where all of it starts.
        inner = (x @ self.down @ self.up + self.bias).clamp(min=0)
        return x + self.scale[index] * inner + self.shift[index]
