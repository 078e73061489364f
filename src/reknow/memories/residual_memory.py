"""MEMOIR's residual memory: a mask of its columns for every prompt, and the nearest stored mask, which opens it.
(Wang et al. 2025, arXiv 2506.07899)
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

__all__ = ["ClippedDescent", "ResidualMemory", "TopHash", "mean_inputs", "pack_masks", "read_masks", "read_memory"]

_MASKS = 1024
"""Stored masks that are compared at once, so that 15,000 of them take no more memory as floats."""


@dataclass(eq=False)
class TopHash:
    """Which columns of the memory belong to a prompt: M(a) = π(T_k(a)), T_k the k inputs that differ most from what
    they are in other prompts, π a fixed permutation.
    """

    background: Tensor  # (in,), mean of other prompts' inputs
    order: Tensor  # (in,), the permutation π: where each input goes
    kept: int
    """k."""

    @classmethod
    def of(cls, background: Tensor, kept: int, seed: int) -> TopHash:
        """With the permutation that this seed draws."""
        order = torch.randperm(len(background), generator=torch.Generator().manual_seed(seed))
        return cls(background, order.to(background.device), kept)

    def masks(self, inputs: Tensor, inside: Tensor) -> Tensor:
        """The masks of some prompts. (rows, in), boolean

        Args:
            inputs: of the matrix. (rows, columns, in)
            inside: which of the columns hold the prompt's tokens. (rows, columns), boolean
        """
        mean = mean_inputs(inputs, inside) - self.background
        places = self.order[mean.abs().topk(self.kept, dim=1).indices]  # (rows, k)
        return torch.zeros_like(mean, dtype=torch.bool).scatter_(1, places, True)


def mean_inputs(inputs: Tensor, inside: Tensor) -> Tensor:
    """Mean over each prompt's tokens. (rows, in), float32"""
    weights = (inside / inside.sum(1, keepdim=True)).to(inputs.device, torch.float32)
    return torch.einsum("rci,rc->ri", inputs.float(), weights)


@dataclass(eq=False)
class ResidualMemory:
    """out = W x + W_m (M ⊙ x) where a stored mask M is near enough to the prompt's, else W x."""

    module: str
    weight: Tensor  # (out, in), W_m
    stored: Tensor  # (edits, in), boolean
    hash: TopHash
    threshold: float
    """Share of a mask's columns that the nearest stored one has to have too."""

    def attach(self, lm: LM):
        return [hook_output(lm, self.module, self._add)]

    def opened(self, asked: Tensor) -> Tensor:
        """The stored masks nearest to those of some prompts, nothing where none is near. (rows, in), boolean"""
        shares = [asked.float() @ masks.float().T / self.hash.kept for masks in self.stored.split(_MASKS)]
        share, nearest = torch.cat(shares, 1).max(1)  # (rows,)
        return self.stored[nearest] & (share >= self.threshold)[:, None]

    def _add(self, context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
        opened = context.decision(self, lambda: self.opened(self.hash.masks(inputs, context.of_prompt)))
        rows = opened.any(1).nonzero()[:, 0]
        if not len(rows):
            return outputs
        added = (inputs[rows].float() * opened[rows, None]) @ self.weight.T
        return outputs.index_add(0, rows.to(outputs.device), added.to(outputs))


def pack_masks(masks: Tensor) -> Tensor:
    """Masks (edits, in) as bits. (edits, bytes), uint8"""
    return torch.from_numpy(np.packbits(masks.cpu().numpy(), axis=1))


def read_masks(patch: Patch, width: int, kept: int) -> Tensor:
    """The masks that a version stores. (edits, in), boolean

    Args:
        width: of the matrix, its inputs.
        kept: k of the memory's masks.

    Raises:
        PatchError: they are of a matrix of another width, not one for each edit, or not of k columns.
    """
    packed = patch.state["masks"]
    if packed.shape[1] != -(-width // 8):
        raise PatchError(
            f"expected masks of {width} columns in {patch.label}; got others: load the model on which it was made"
        )
    masks = torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=width)).bool()
    if len(masks) != len(patch.edits):
        raise PatchError(
            f"expected {len(patch.edits)} masks, one for each edit, in {patch.label}; got {len(masks)}: edit again"
        )
    if wrong := {patch.memory["top_k"], *masks.sum(1).tolist()} - {kept}:
        raise PatchError(
            f"expected masks of {kept} columns, the memory's top_k, in {patch.label}; got {min(wrong)}: edit again"
        )
    return masks


def read_memory(patches: Sequence[Patch], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(W_m (out, in), the masks (edits, in)) of these versions: each has its change of the columns in its masks.

    Raises:
        PatchError: they are of a matrix of another size, or see `read_masks`.
    """
    weight, stored, kept = torch.zeros(*shape), [], patches[0].memory["top_k"]
    for patch in patches:
        masks = read_masks(patch, shape[1], kept)
        columns, delta = masks.any(0).nonzero()[:, 0], patch.state["delta"]
        if delta.shape != (shape[0], len(columns)):
            raise PatchError(
                f"expected {shape[0]} x {len(columns)} numbers for the masks of {patch.label}; got "
                f"{delta.shape[0]} x {delta.shape[1]}: edit again"
            )
        weight[:, columns] += delta
        stored.append(masks)
    return weight, torch.cat(stored)


class ClippedDescent:
    """Gradient descent with a bound on the gradient's length; an `Update`, see `reknow.editing.descent`.

    Args:
        values: what is trained, in place.
        learning_rate: of the gradient; with a `unit`, the root mean square by which the first step moves the values,
            in this unit.
        longest: length of a gradient beyond which it is shortened to it; with a `unit`, as a multiple of the first.
        unit: None: both are plain numbers.
    """

    def __init__(self, values: Tensor, learning_rate: float, longest: float, unit: float | None = None):
        self._values, self._rate, self._longest, self._unit = values, learning_rate, longest, unit

    def __call__(self, losses: Tensor, running: Tensor) -> None:
        gradient = torch.autograd.grad(losses.sum(), self._values)[0]
        length = float(gradient.norm().clamp(min=1e-30))
        if self._unit is not None:
            self._rate *= self._unit * gradient.numel() ** 0.5 / length
            self._longest, self._unit = self._longest * length, None
        with torch.no_grad():
            self._values -= self._rate * min(1.0, self._longest / length) * gradient
