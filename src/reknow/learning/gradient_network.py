"""The network that turns a gradient's factors into an edit, and its training step: what MEND and InstructEdit share.

    z = [norm(u); norm(δ)]                         norm: by statistics that run along in training
    h = z + relu(s₁ ⊙ (U₁V₁z + b₁) + o₁),  [ũ; δ̃] = h + relu(s₂ ⊙ (U₂V₂h + b₂) + o₂)
    W ← W − α Σ_tokens δ̃ ũᵀ                        Mitchell et al. 2021, arXiv 2110.11309, §3

Matrices of one shape share the network; s, o and the step size α are each matrix's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from reknow.edits import Case
from reknow.learning.blocks import MatrixGroups, MENDBlock, RunningNorm, transform_factors
from reknow.learning.editors import fill_network
from reknow.learning.examples import Example, Losses, mean_over_batches
from reknow.learning.gradients import (
    TokenFactors,
    flat_factors,
    gradient_factors,
    mlp_matrices,
    row_changes,
    token_delta,
)
from reknow.learning.loop import seeded
from reknow.learning.settings import NetworkSettings
from reknow.learning.training import Split, Training, parameter_groups
from reknow.lm import LM
from reknow.model.tokens import Text
from reknow.patching.deltas import Delta

__all__ = ["GradientNetwork", "TransformLearner", "make_network", "transform_gradients"]


_Prepare = Callable[[Sequence[Case], random.Random], Sequence[Case]]
"""What becomes of a batch before it is learned from."""


def make_network(settings: NetworkSettings, lm: LM, tensors: Mapping[str, Tensor] | None = None) -> GradientNetwork:
    """The network as it is before training, or with what an editor has learned."""
    if tensors is not None:
        return fill_network(lambda: GradientNetwork(settings, lm), tensors)
    with seeded(settings.seed, "mend"):
        return GradientNetwork(settings, lm).to(lm.device)


def transform_gradients(
    lm: LM, settings: NetworkSettings, tensors: Mapping[str, Tensor], texts: Sequence[Text]
) -> tuple[dict[str, Delta], float]:
    """The change of each matrix that a trained network makes of the texts' gradients, and their mean loss."""
    network = make_network(settings, lm, tensors)
    with torch.no_grad():
        factors, loss = flat_factors(lm, network.names, lm.encode(texts))
        return {name: token_delta(left, right) for name, (left, right) in network(factors).items()}, loss


class GradientNetwork(nn.Module):
    """The networks of all groups of matrices, their statistics, and the step sizes."""

    def __init__(self, settings: NetworkSettings, lm: LM):
        super().__init__()
        assert settings.layers is not None
        self.normalize = settings.normalize_gradient
        self.names = mlp_matrices(lm, settings.layers)
        self.groups = MatrixGroups(lm, self.names)
        shapes = self.groups.shapes.items()
        self.transforms = nn.ModuleDict(
            {group: _Transform(inside, out, settings.rank, count) for group, (out, inside, count) in shapes}
        )
        self.step = nn.Parameter(torch.full((len(self.names),), settings.step_size))

    def observe(self, factors: TokenFactors) -> None:
        """Takes the factors u (n, in) and δ (n, out) of each matrix into the statistics."""
        for name, (u, delta) in factors.items():
            self._transform(name).norm.observe(torch.cat([u, self._scaled(delta)], 1))

    def forward(self, factors: TokenFactors) -> TokenFactors:
        """name → (−α δ̃, ũ) of its factors. (n, out), (n, in)"""
        changes = {}
        for i, name in enumerate(self.names):
            u, delta = factors[name]
            u, delta = self._transform(name)(u, self._scaled(delta), self.groups.index[name])
            changes[name] = (-self.step[i] * self.groups.scale[name] * delta, u)
        return changes

    def _transform(self, name: str) -> _Transform:
        transform = self.transforms[self.groups.group[name]]
        assert isinstance(transform, _Transform)
        return transform

    def _scaled(self, delta: Tensor) -> Tensor:
        return delta / delta.norm(dim=1, keepdim=True) if self.normalize else delta


class _Transform(nn.Module):
    """[u; δ] → [ũ; δ̃] for all matrices of one shape."""

    def __init__(self, inside: int, out: int, rank: int, matrices: int):
        super().__init__()
        self.norm = RunningNorm(inside + out)
        self.blocks = nn.ModuleList([MENDBlock(inside + out, rank, matrices) for _ in range(2)])

    def forward(self, u: Tensor, delta: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """(n, in), (n, out) → the same, for the matrix of this index."""
        return transform_factors(self.norm, self.blocks, u, delta, index)


class TransformLearner:
    """MEND's training step (Alg. 1)."""

    def __init__(self, settings: NetworkSettings, lm: LM, cases: Split, training: Training, prepare: _Prepare):
        self.settings, self.lm, self.batch_size, self.prepare = settings, lm, training.batch_size, prepare
        self.lower = settings.lower_states(lm, cases, training)
        self.module = make_network(settings, lm)

    def optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        own = {"step": settings.step_size_learning_rate}
        return torch.optim.Adam(parameter_groups(self.module, settings.learning_rate, own))

    def loss(self, batch: Sequence[Case], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        losses = self._losses(batch, rng, observe=True)
        return self.settings.edit_weight * losses.edit + losses.locality, losses.named()

    @torch.no_grad()
    def validate(self, cases: Sequence[Case]) -> dict[str, float]:
        means = mean_over_batches(lambda batch, rng: self._losses(batch, rng).named(), cases, self.batch_size)
        return means | {"loss": self.settings.edit_weight * means["L_edit"] + means["L_loc"]}

    def _losses(self, batch: Sequence[Case], rng: random.Random, *, observe: bool = False) -> Losses:
        """The losses where each group of edits that are made at once is made by itself, all groups in one batch."""
        at_once = self.settings.edits_per_example
        examples = self.settings.make_examples(self.prepare(batch, rng), rng, edits_at_once=at_once)
        with self.lower.given([text for example in examples for text in example.texts]):
            return self._try(examples, observe=observe)

    def _try(self, examples: Sequence[Example], *, observe: bool) -> Losses:
        at_once = self.settings.edits_per_example
        rows = self.lm.encode([example.edit for example in examples])
        factors, _ = gradient_factors(self.lm, self.module.names, rows)
        flat = {name: one.flat() for name, one in factors.items()}
        if observe:
            self.module.observe(flat)
        changes = {
            name: (_grouped(factors[name].spread(u), at_once), _grouped(factors[name].spread(v), at_once))
            for name, (u, v) in self.module(flat).items()
        }
        read = self.settings.read_examples(self.lm, examples)
        return read.losses(lambda numbers: row_changes(self.lm, changes, numbers // at_once))


def _grouped(side: Tensor, size: int) -> Tensor:
    """Factors of the edits that are made at once, in one row. (edits, columns, n) → (groups, size · columns, n)"""
    missing = -len(side) % size
    side = torch.cat([side, side.new_zeros(missing, *side.shape[1:])]) if missing else side
    return side.reshape(-1, size * side.shape[1], side.shape[2])
