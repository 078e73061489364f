"""The network that turns a gradient's factors into an edit, and its training step: what MEND and InstructEdit share.

    z = [norm(u); norm(δ)]                         norm: by statistics that run along in training
    h = z + relu(s₁ ⊙ (U₁V₁z + b₁) + o₁),  [ũ; δ̃] = h + relu(s₂ ⊙ (U₂V₂h + b₂) + o₂)
    W ← W − α Σ_tokens δ̃ ũᵀ                        Mitchell et al. 2021, arXiv 2110.11309, §3

Matrices of one shape share the network; s, o and the step size α are each matrix's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reknow.edits import Case
from reknow.learning.editors import filled
from reknow.learning.examples import Outcome, averaged
from reknow.learning.gradients import RunningNorm, Shapes, flat_factors, gradient_factors, matrices, used_rows
from reknow.learning.loop import seeded
from reknow.model.tokens import Text
from reknow.patching.deltas import Delta, as_delta

if TYPE_CHECKING:
    from reknow.learning.settings import NetworkSettings
    from reknow.lm import LM


Prepare = Callable[[Sequence[Case], random.Random], Sequence[Case]]
"""What becomes of a batch before it is learned from."""


def new_network(settings: NetworkSettings, lm: LM, tensors: Mapping[str, Tensor] | None = None) -> GradientNetwork:
    """The network as it is before training, or with what an editor has learned."""
    if tensors is not None:
        return filled(lambda: GradientNetwork(settings, lm), tensors)
    with seeded(settings.seed, "mend"):
        return GradientNetwork(settings, lm).to(lm.device)


def transformed(
    lm: LM, settings: NetworkSettings, tensors: Mapping[str, Tensor], texts: Sequence[Text]
) -> tuple[dict[str, Delta], float]:
    """The change of each matrix that a trained network makes of the texts' gradients, and their mean loss."""
    network = new_network(settings, lm, tensors)
    with torch.no_grad():
        factors, loss = flat_factors(lm, network.names, lm.encode(texts))
        deltas = {name: as_delta(*used_rows(left, right)) for name, (left, right) in network(factors).items()}
    return deltas, loss


class GradientNetwork(nn.Module):
    """The networks of all shapes, their statistics, and the step sizes."""

    def __init__(self, settings: NetworkSettings, lm: LM):
        super().__init__()
        assert settings.layers is not None
        self.layers, self.names, self.unit = (
            settings.layers,
            matrices(lm, settings.layers),
            settings.normalize_gradient,
        )
        self.shapes = Shapes(lm, self.names)
        self.transforms = nn.ModuleDict(
            {kind: Transform(inside, out, settings.rank, n) for kind, (out, inside, n) in self.shapes.kinds.items()}
        )
        self.step = nn.Parameter(torch.full((len(self.names),), settings.step_size))

    def observe(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Takes the factors u (n, in) and δ (n, out) of each matrix into the statistics."""
        for name, found in factors.items():
            self._transform(name).norm.observe(torch.cat(self._scaled(*found), 1))

    def forward(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """name → (−α δ̃, ũ) of its factors. (n, out), (n, in)"""
        changes = {}
        for i, name in enumerate(self.names):
            u, delta = self._transform(name)(*self._scaled(*factors[name]), self.shapes.number[name])
            changes[name] = (-self.step[i] * self.shapes.scale[name] * delta, u)
        return changes

    def _transform(self, name: str) -> Transform:
        transform = self.transforms[self.shapes.kind[name]]
        assert isinstance(transform, Transform)
        return transform

    def _scaled(self, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        return u, delta / delta.norm(dim=1, keepdim=True) if self.unit else delta


class Transform(nn.Module):
    """[u; δ] → [ũ; δ̃] for all matrices of one shape."""

    def __init__(self, inside: int, out: int, rank: int, modes: int):
        super().__init__()
        self.sizes = [inside, out]
        self.norm = RunningNorm(inside + out)
        self.blocks = nn.ModuleList([Residual(inside + out, rank, modes) for _ in range(2)])

    def forward(self, u: Tensor, delta: Tensor, mode: int) -> tuple[Tensor, Tensor]:
        """(n, in), (n, out) → the same."""
        state = self.norm(torch.cat([u, delta], 1))
        for block in self.blocks:
            state = block(state, mode)
        u, delta = state.split(self.sizes, 1)
        return u, delta


class Residual(nn.Module):
    """x + relu(s ⊙ (U V x + b) + o), the identity at the start; s and o by mode."""

    def __init__(self, size: int, rank: int, modes: int):
        super().__init__()
        rank = min(rank, size)
        self.left = nn.Parameter(torch.zeros(size, rank))  # U
        # Scaled so that Vx is of order 1: then one learning rate moves U and V alike, whatever the size.
        self.right = nn.Parameter(torch.randn(rank, size) * size**-0.5)  # V
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(modes, size))
        self.shift = nn.Parameter(torch.zeros(modes, size))

    def forward(self, x: Tensor, mode: int) -> Tensor:
        inner = (x @ self.right.T) @ self.left.T + self.bias
        # A clamp, unlike relu, has a gradient at zero, where all of it starts.
        return x + (inner * self.scale[mode] + self.shift[mode]).clamp(min=0)


class TransformLearner:
    """MEND's training step (Alg. 1)."""

    def __init__(self, settings: NetworkSettings, lm: LM, batch_size: int, prepare: Prepare):
        self.settings, self.lm, self.batch_size, self.prepare = settings, lm, batch_size, prepare
        self.module = new_network(settings, lm)

    def optimizer(self) -> torch.optim.Optimizer:
        rest = [p for name, p in self.module.named_parameters() if name != "step"]
        return torch.optim.Adam(
            [
                {"params": rest, "lr": self.settings.learning_rate},
                {"params": [self.module.step], "lr": self.settings.step_size_learning_rate},
            ]
        )

    def loss(self, batch: Sequence[Case], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        outcome = self._trial(batch, rng, learn=True)
        return self.settings.edit_weight * outcome.edit + outcome.stay, outcome.shown()

    @torch.no_grad()
    def validate(self, cases: Sequence[Case]) -> dict[str, float]:
        found = averaged(lambda part, rng: self._trial(part, rng).shown(), cases, self.batch_size)
        return found | {"loss": self.settings.edit_weight * found["L_edit"] + found["L_loc"]}

    def _trial(self, batch: Sequence[Case], rng: random.Random, *, learn: bool = False) -> Outcome:
        """Each group of cases is edited by itself, all groups in one batch, and examined."""
        together = self.settings.edits_per_example
        found = self.settings.lessons(self.prepare(batch, rng), rng, together=together)
        rows = self.lm.encode([lesson.edit for lesson in found])
        factors, _ = gradient_factors(self.lm, self.module.names, rows)
        flat = {name: one.flat() for name, one in factors.items()}
        if learn:
            self.module.observe(flat)
        changes = {}
        for name, (left, right) in self.module(flat).items():
            spread = factors[name].spread
            changes[name] = (self._grouped(spread(left), len(batch)), self._grouped(spread(right), len(batch)))
        return self.settings.exam(self.lm, found).read(changes, together=together)

    def _grouped(self, side: Tensor, cases: int) -> Tensor:
        """Factors of the cases that are edited together, in one row. (groups, edits · columns, features)"""
        each = self.settings.edits_per_example
        missing = -cases % each
        side = torch.cat([side, side.new_zeros(missing, *side.shape[1:])]) if missing else side
        return side.reshape(-1, each * side.shape[1], side.shape[2])
