"""MALMEN: Massive Editing for Large Language Models via Meta Learning. Tan, Zhang, Fu 2023, arXiv 2311.04661.

A network transforms the gradient factors of each edit, as MEND's does, but what it asks of a matrix is not added up:
ΔW is the least-squares answer to all edits' wishes, so that thousands of them do not drown each other.

    [k̃; g̃] = network([norm(k); norm(g)]),   v = −α (k·k̃) g̃           k, g at the tokens that predict the answer
    ΔW = Vᵀ K (Kᵀ K + e^λ I)⁻¹                                        K: the raw k, a row per token        (eq. 4)

α and λ are learned for each matrix. In training the model is differentiated by ΔW and ΔW by the network, one after
the other, so that no graph of both has to be kept (§4.2, Alg. 1).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from reknow.checks.bounds import Number, Rank, Rate, Weight
from reknow.contract import check_edits, make_patch
from reknow.edits import Case, Edit
from reknow.errors import InputError
from reknow.learning.editors import filled
from reknow.learning.examples import averaged, bare
from reknow.learning.gradients import RunningNorm, Shapes, flat_factors, matrices, used_rows
from reknow.learning.loop import seeded
from reknow.learning.settings import MatrixEditor
from reknow.learning.training import Learner, Training
from reknow.model.exact import exact
from reknow.model.tokens import Text
from reknow.patching.deltas import as_delta
from reknow.patching.patches import Patch

if TYPE_CHECKING:
    from reknow.lm import LM

READ_TOGETHER = 16
"""Cases whose texts are read together."""


@dataclass(frozen=True)
class MALMEN(MatrixEditor):
    """A network, trained once for a model, and least squares: many edits at once."""

    rank: Rank = 1920
    """Of the network's matrices, at most their width."""
    blocks: Number = 2
    """Of the network."""
    step_size: Rate = 1e-3
    """α at the start, in units of the matrix's root mean square."""
    locality_weight: Weight = 1.0
    """Of KL on other facts against the answers' loss."""
    learning_rate: Rate = 1e-5
    """Of Adam, for everything that is learned."""

    training: ClassVar[Training] = Training(
        steps=1000, batch_size=64, clip_norm=1.0, validation=128, validate_every=50, checkpoint_every=50
    )

    @property
    def name(self) -> str:
        return "malmen"

    def learner(
        self, lm: LM, train_cases: Sequence[Case], validation_cases: Sequence[Case], training: Training
    ) -> Learner:
        return _Learner(self, lm, training.batch_size)

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits)
        trained, tensors = self.trained(lm)
        if trained.blocks > len(tensors):
            raise InputError(
                f"expected an editor of {trained.blocks} blocks; got {len(tensors)} tensors: train another"
            )
        network = filled(lambda: MALMENNetwork(trained, lm), tensors)
        rows = lm.encode([Text.asked(edit) for edit in edits])
        deltas = {}
        with torch.no_grad():
            factors, loss = flat_factors(lm, network.names, rows, answers_only=True)
            for name, v in network(factors).items():
                deltas[name] = as_delta(*used_rows(v, network.solved(name, factors[name][0])))
        return make_patch(self, lm, edits, deltas, notes={"layers": list(network.layers), "loss": loss})

    def _network(self, lm: LM) -> MALMENNetwork:
        with seeded(self.seed, "malmen"):
            return MALMENNetwork(self, lm).to(lm.device)


class MALMENNetwork(nn.Module):
    """The networks of all shapes with their statistics, and α and λ of each matrix."""

    def __init__(self, method: MALMEN, lm: LM):
        super().__init__()
        assert method.layers is not None
        self.layers, self.names = method.layers, matrices(lm, method.layers)
        self.shapes = Shapes(lm, self.names)
        kinds = self.shapes.kinds.items()
        self.norms = nn.ModuleDict({kind: RunningNorm(out + inside) for kind, (out, inside, _) in kinds})
        self.transforms = nn.ModuleDict(
            {
                kind: nn.ModuleList([Block(out + inside, method.rank, n) for _ in range(method.blocks)])
                for kind, (out, inside, n) in kinds
            }
        )
        self.step = nn.Parameter(torch.full((len(self.names),), method.step_size))  # α
        self.stiffness = nn.Parameter(torch.zeros(len(self.names)))  # log λ, under its name in editor files

    def observe(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Takes the factors k (n, in) and g (n, out) of each matrix into the statistics."""
        for name, found in factors.items():
            norm = self.norms[self.shapes.kind[name]]
            assert isinstance(norm, RunningNorm)
            norm.observe(torch.cat(found, 1))

    def forward(self, factors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """name → V, where each token's output has to move. (n, out)"""
        wishes = {}
        for i, name in enumerate(self.names):
            k, g = factors[name]
            kind = self.shapes.kind[name]
            state = self.norms[kind](torch.cat([k, g], 1))
            blocks = self.transforms[kind]
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                state = block(state, self.shapes.number[name])
            k_new, g_new = state.split([k.shape[1], g.shape[1]], 1)
            wishes[name] = -self.step[i] * self.shapes.scale[name] * (k * k_new).sum(1, keepdim=True) * g_new
        return wishes

    @torch.no_grad()
    def solved(self, name: str, k: Tensor) -> Tensor:
        """K (KᵀK + e^λ I)⁻¹, by which Vᵀ becomes ΔW; float64 inside. (n, in)"""
        k64 = exact(k)
        ridge = exact(self.stiffness[self.names.index(name)]).exp()
        if len(k) <= k.shape[1]:  # the same by the smaller of the two systems
            gram = _ridged(k64 @ k64.T, ridge)
            return torch.linalg.solve(gram, k64).to(k)
        gram = _ridged(k64.T @ k64, ridge)
        return torch.linalg.solve(gram, k64.T).T.to(k)


def _ridged(gram: Tensor, ridge: Tensor) -> Tensor:
    """gram + ridge · I, in its place: such a matrix is as large as a layer."""
    gram.diagonal().add_(ridge)
    return gram


class Block(nn.Module):
    """x + s ⊙ relu(A B x + b) + o, the identity at the start; s and o by mode."""

    def __init__(self, size: int, rank: int, modes: int):
        super().__init__()
        rank = min(rank, size)
        self.down = nn.Parameter(torch.randn(size, rank))
        self.up = nn.Parameter(torch.zeros(rank, size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(modes, size))
        self.shift = nn.Parameter(torch.zeros(modes, size))

    def forward(self, x: Tensor, mode: int) -> Tensor:
        # A clamp, unlike relu, has a gradient at zero, where all of it starts.
        inner = (x @ self.down @ self.up + self.bias).clamp(min=0)
        return x + self.scale[mode] * inner + self.shift[mode]


def surrogate(network: MALMENNetwork, factors: dict[str, tuple[Tensor, Tensor]], deltas: dict[str, Tensor]) -> Tensor:
    """A scalar whose gradient by the network is that of the loss whose gradient by each ΔW is in `.grad`.

    The gradient goes through the least squares by hand: ∂/∂V = K M and ∂/∂λ = −e^λ ⟨M, ΔW⟩ with
    M = ∇ (KᵀK + e^λ I)⁻¹, all constants, by which V and λ are multiplied.
    """
    total = network.step.new_zeros(())
    wishes = network(factors)
    for i, name in enumerate(network.names):
        k, gradient = factors[name][0], deltas[name].grad
        assert gradient is not None
        total = total + ((network.solved(name, k) @ gradient.T) * wishes[name]).sum()
        k64, ridge = exact(k), exact(network.stiffness[i].detach()).exp()
        gram = _ridged(k64.T @ k64, ridge)
        m = torch.linalg.solve(gram, exact(gradient).T).T  # (out, in)
        total = total - (ridge * (m * exact(deltas[name].detach())).sum()).float() * network.stiffness[i]
    return total


class _Learner:
    """MALMEN's training step (Alg. 1): all cases of a micro-batch are edited together."""

    def __init__(self, method: MALMEN, lm: LM, together: int):
        self.method, self.lm, self.together = method, lm, together
        self.module = method._network(lm)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.module.parameters(), lr=self.method.learning_rate)

    def loss(self, batch: Sequence[Case], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        factors, deltas, shown = self._trial(batch, rng, learn=True)
        return surrogate(self.module, factors, deltas), shown

    @torch.no_grad()
    def validate(self, cases: Sequence[Case]) -> dict[str, float]:
        found = averaged(lambda part, rng: self._trial(part, rng)[2], cases, self.together)
        return found | {"loss": found["L_edit"] + self.method.locality_weight * found["L_loc"]}

    def _trial(
        self, batch: Sequence[Case], rng: random.Random, *, learn: bool = False
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, float]]:
        """(factors, ΔW of each matrix with its gradient if `learn`, what to show)."""
        found = self.method.lessons(bare(batch), rng, together=len(batch))
        rows = self.lm.encode([lesson.edit for lesson in found])
        factors, _ = flat_factors(self.lm, self.module.names, rows, answers_only=True)
        if learn:
            self.module.observe(factors)
        deltas = {}
        with torch.no_grad():
            for name, v in self.module(factors).items():
                deltas[name] = (v.T @ self.module.solved(name, factors[name][0])).requires_grad_(learn)  # (out, in)
        parts = [found[i : i + READ_TOGETHER] for i in range(0, len(found), READ_TOGETHER)]
        shown: dict[str, float] = {}
        for part in parts:
            share = len(part) / len(found)
            outcome = self.method.exam(self.lm, part).read_with(deltas)
            if learn:
                (share * (outcome.edit + self.method.locality_weight * outcome.stay)).backward()
            for name, value in outcome.shown().items():
                shown[name] = shown.get(name, 0.0) + share * value
        return factors, deltas, shown
