"""WISE's side memory: shards that change a part of a matrix each, TIES that merges them, and routing by activation.
(Wang et al. 2024, arXiv 2405.14768, §3; TIES: Yadav et al. 2023, arXiv 2306.01708)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reknow.errors import PatchError
from reknow.lm import LM
from reknow.model.forward_context import ForwardContext
from reknow.patching.memory import hook_output
from reknow.patching.patches import Patch

__all__ = ["Shard", "ShardDescent", "SideMemory", "distance", "divide", "read_shards", "ties"]

_WEIGHTS_PER_EDIT = 18_000
"""Weights of its part that a shard has for each edit: a fifth of Llama-2's 4096 × 11008 for 500 edits."""
_MASK_RATIO, _LEAST_EDITS = 0.2, 10
"""The paper's ρ; a shard's fewest edits, where a matrix is so small that the part has to be larger."""


def divide(weights: int, shard_size: int | None = None, mask_ratio: float | None = None) -> tuple[int, float]:
    """(edits of a shard, share of the weights that it may change) for a matrix of so many weights.

    Args:
        shard_size: None: as many edits as have the paper's number of weights each in the paper's share.
        mask_ratio: None: the share in which each edit has that number.
    """
    size = shard_size or max(_LEAST_EDITS, int(_MASK_RATIO * weights / _WEIGHTS_PER_EDIT))
    return size, mask_ratio or min(1.0, max(_MASK_RATIO, size * _WEIGHTS_PER_EDIT / weights))


@dataclass
class Shard:
    """Part of the weights, and how they changed."""

    mask: Tensor  # (out, in), boolean: the part
    change: Tensor  # (out, in), float32, 0 elsewhere

    @classmethod
    def new(cls, shape: Sequence[int], share: float, seed: int) -> Shard:
        """A random part of a matrix of this shape (out, in), nothing changed yet."""
        chosen = torch.rand(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed)) < share
        return cls(chosen.view(*shape), torch.zeros(*shape))

    def packed_mask(self) -> Tensor:
        """The part as bits."""
        return torch.from_numpy(np.packbits(self.mask.numpy()))


def read_shards(patches: Sequence[Patch], shape: Sequence[int]) -> dict[int, Shard]:
    """The shards that these versions make up: `mask.NUMBER` begins one, `delta.NUMBER` is added to its part.

    Args:
        shape: of the matrix. (out, in)

    Raises:
        PatchError: they are of a matrix of another size.
    """
    shards: dict[int, Shard] = {}
    weights = shape[0] * shape[1]
    for patch in patches:
        for name in sorted(patch.state, reverse=True):  # masks before changes
            kind, _, number = name.partition(".")
            tensor = patch.state[name]
            if kind == "mask":
                if len(tensor) != -(-weights // 8):
                    raise PatchError(
                        f"expected masks of {shape[0]} x {shape[1]} in {patch.label}; got others: edit again"
                    )
                mask = torch.from_numpy(np.unpackbits(tensor.numpy(), count=weights)).bool().view(*shape)
                shards[int(number)] = Shard(mask, torch.zeros(*shape))
            elif kind == "delta":
                shard = shards[int(number)]
                shard.change[shard.mask] += tensor
    return shards


class ShardDescent:
    """Gradient descent on the part of the weights that a shard may change; an `Update`, see `reknow.editing.descent`.

    Args:
        delta: what is trained, in place. (out, in)
        mask: the part. (out, in), boolean
        learning_rate: of the gradient; where it is `relative`, the root mean square of the first step.
        clamp: largest change of a weight.
    """

    def __init__(self, delta: Tensor, mask: Tensor, learning_rate: float, clamp: float, *, relative: bool):
        self._delta, self._mask = delta, mask
        self._rate, self._clamp, self._relative = learning_rate, clamp, relative

    def __call__(self, losses: Tensor, running: Tensor) -> None:
        gradient = torch.autograd.grad(losses.sum(), self._delta)[0] * self._mask
        if self._relative:
            self._rate /= max(float(gradient[self._mask].square().mean().sqrt()), 1e-30)
            self._relative = False
        with torch.no_grad():
            self._delta -= self._rate * gradient
            self._delta.clamp_(-self._clamp, self._clamp)


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """TIES: each change is cut to its largest entries, the sign of the larger sum is elected, and entries that agree
    with it are averaged."""
    trimmed = []
    for delta in deltas:
        flat = delta.flatten()
        count = max(1, int(density * len(flat)))
        largest = flat.abs().topk(count).indices
        trimmed.append(torch.zeros_like(flat).index_put((largest,), flat[largest]).view(delta.shape))
    stacked = torch.stack(trimmed)  # (shards, out, in)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = stacked.sign() == elected
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def distance(inputs: Tensor, where: Tensor, delta: Tensor) -> Tensor:
    """Equation 3: how far the side memory moves the matrix's output, mean over the tokens `where` says. (rows,)

    Args:
        inputs: (rows, columns, in).
        where: (rows, columns), boolean.
        delta: W′ − W. (out, in)
    """
    moved = (inputs.to(delta.dtype) @ delta.T).norm(dim=-1) * where  # (rows, columns)
    return moved.sum(1) / where.sum(1)


@dataclass(eq=False)
class SideMemory:
    """Side memories beside one matrix, and the hook that routes to the one that a prompt moves farthest."""

    module: str
    deltas: Tensor  # (memories, out, in)
    thresholds: Tensor  # (memories,), distances above which a prompt is routed

    def attach(self, lm: LM):
        return [hook_output(lm, self.module, self._route)]

    def _route(self, context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
        def choose() -> Tensor:
            inside = context.of_prompt.to(inputs.device)
            moved = torch.stack([distance(inputs, inside, delta) for delta in self.deltas], 1)
            farthest, chosen = torch.where(moved > self.thresholds, moved, -1.0).max(1)  # (rows,)
            return torch.where(farthest >= 0, chosen, -1)

        chosen = context.decision(self, choose)
        for i, delta in enumerate(self.deltas):
            rows = (chosen == i).nonzero()[:, 0]
            if len(rows):
                moved = (inputs[rows].to(delta.dtype) @ delta.T).to(outputs.dtype)
                outputs = outputs.index_add(0, rows, moved)
        return outputs
