"""MALMEN: Massive Editing for Large Language Models via Meta Learning. Tan, Zhang, Fu 2023, arXiv 2311.04661.

A network transforms the gradient factors of each edit, as MEND's does, but what it asks of a matrix is not added up:
ΔW is the least-squares answer to what all edits ask for, so that thousands of them do not drown each other.

    [k̃; g̃] = network([norm(k); norm(g)]),   v = −α (k·k̃) g̃           k, g at the tokens that predict the answer
    ΔW = Vᵀ K (Kᵀ K + e^λ I)⁻¹                                        K: the raw k, a row per token        (eq. 4)

α and λ are learned for each matrix. In training the model is differentiated by ΔW and ΔW by the network, one after
the other, so that no graph of both has to be kept (§4.2, Alg. 1).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from reknow.checks.bounds import NonNegative, Rank, Rate
from reknow.editing.solvers import least_squares
from reknow.edits import Case, Edit
from reknow.learning.blocks import MALMENBlock, MatrixGroups, RunningNorm, transform_factors
from reknow.learning.editors import fill_network
from reknow.learning.examples import Example, mean_over_batches, without_instructions
from reknow.learning.gradients import TokenFactors, delta_added, flat_factors, mlp_matrices, token_delta
from reknow.learning.loop import seeded
from reknow.learning.lower_states import LowerStates
from reknow.learning.settings import Changes, MatrixEditor, Tensors
from reknow.learning.training import Learner, Split, Training
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.tokens import Text

_CASES_PER_PASS = 16
"""Cases whose texts are read at once in training."""


@dataclass(frozen=True)
class MALMEN(MatrixEditor):
    """A network, trained once for a model, and least squares: many edits at once."""

    rank: Rank = 1920
    """Rank of the network's matrices, at most their width."""
    blocks: Annotated[int, Field(ge=1, le=64)] = 2
    """Blocks of the network."""
    step_size: Rate = 1e-3
    """Step size α at the start, in units of the matrix's root mean square."""
    locality_weight: NonNegative = 1.0
    """Weight of KL on other facts against the answers' loss."""
    learning_rate: Rate = 1e-5
    """Learning rate of Adam for everything that is learned."""

    sums_edits: ClassVar[bool] = False
    training: ClassVar[Training] = Training(
        steps=1000, batch_size=64, clip_norm=1.0, validation=128, validate_every=50, checkpoint_every=50
    )

    @property
    def name(self) -> str:
        return "malmen"

    def learner(self, lm: LM, cases: Split, training: Training) -> Learner:
        return _Learner(self, lm, training.batch_size, self.lower_states(lm, cases, training))

    def transform(self, lm: LM, edits: Sequence[Edit], trained: Self, tensors: Tensors) -> Changes:
        network = fill_network(lambda: MALMENNetwork(trained, lm), tensors)
        rows = lm.encode([Text.asked(edit) for edit in edits])
        factors, loss = flat_factors(lm, network.names, rows, answers_only=True)
        shifts = network(factors)
        return {name: token_delta(shifts[name], network.weigh(name, k)) for name, (k, _) in factors.items()}, loss


class MALMENNetwork(nn.Module):
    """The networks of all groups of matrices with their statistics, and α and λ of each matrix."""

    def __init__(self, method: MALMEN, lm: LM):
        super().__init__()
        assert method.layers is not None
        self.names = mlp_matrices(lm, method.layers)
        self.groups = MatrixGroups(lm, self.names)
        shapes = self.groups.shapes.items()
        self.norms = nn.ModuleDict({group: RunningNorm(out + inside) for group, (out, inside, _) in shapes})
        self.transforms = nn.ModuleDict(
            {
                group: nn.ModuleList([MALMENBlock(out + inside, method.rank, count) for _ in range(method.blocks)])
                for group, (out, inside, count) in shapes
            }
        )
        self.step = nn.Parameter(torch.full((len(self.names),), method.step_size))  # α
        self.stiffness = nn.Parameter(torch.zeros(len(self.names)))  # λ, under its name in editor files

    def observe(self, factors: TokenFactors) -> None:
        """Takes the factors k (n, in) and g (n, out) of each matrix into the statistics."""
        for name, pair in factors.items():
            norm = self.norms[self.groups.group[name]]
            assert isinstance(norm, RunningNorm)
            norm.observe(torch.cat(pair, 1))

    def forward(self, factors: TokenFactors) -> dict[str, Tensor]:
        """name → V, how far each token's output has to move. (n, out)"""
        shifts = {}
        for i, name in enumerate(self.names):
            (k, g), group = factors[name], self.groups.group[name]
            blocks = self.transforms[group]
            assert isinstance(blocks, nn.ModuleList)
            k_new, g_new = transform_factors(self.norms[group], blocks, k, g, self.groups.index[name])
            shifts[name] = -self.step[i] * self.groups.scale[name] * (k * k_new).sum(1, keepdim=True) * g_new
        return shifts

    def ridge(self, name: str) -> Tensor:
        """e^λ of a matrix, float64. Scalar"""
        return exact(self.stiffness[self.names.index(name)].detach()).exp()

    def weigh(self, name: str, k: Tensor) -> Tensor:
        """K (KᵀK + e^λ I)⁻¹, by which Vᵀ becomes ΔW. (n, in)"""
        return least_squares(None, k, weight=float(self.ridge(name))).to(k)


def surrogate(network: MALMENNetwork, factors: TokenFactors, deltas: Mapping[str, Tensor]) -> Tensor:
    """A scalar whose gradient by the network is that of the loss whose gradient by each ΔW is in `.grad`.

    The gradient goes through the least squares by hand: ∂/∂V = A ∇ᵀ and ∂/∂λ = −⟨V, (I − A Kᵀ) A ∇ᵀ⟩ with
    A = K (KᵀK + e^λ I)⁻¹, all constants, by which V and λ are multiplied.
    """
    total = network.step.new_zeros(())
    shifts = network(factors)
    for i, name in enumerate(network.names):
        k, gradient, shift = exact(factors[name][0]), deltas[name].grad, shifts[name]
        assert gradient is not None
        a = network.weigh(name, k)  # (n, in), float64
        by_value = a @ exact(gradient).T  # (n, out)
        by_regularization = -(exact(shift.detach()) * (by_value - (a @ k.T) @ by_value)).sum()
        total = total + (by_value.to(shift) * shift).sum() + by_regularization.to(shift) * network.stiffness[i]
    return total


class _Learner:
    """MALMEN's training step (Alg. 1): the edits of all cases of a micro-batch are made at once."""

    def __init__(self, method: MALMEN, lm: LM, batch_size: int, lower: LowerStates):
        self.method, self.lm, self.batch_size, self.lower = method, lm, batch_size, lower
        with seeded(method.seed, "malmen"):
            self.module = MALMENNetwork(method, lm).to(lm.device)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.module.parameters(), lr=self.method.learning_rate)

    def loss(self, batch: Sequence[Case], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        factors, deltas, shown = self._try(batch, rng, learn=True)
        return surrogate(self.module, factors, deltas), shown

    @torch.no_grad()
    def validate(self, cases: Sequence[Case]) -> dict[str, float]:
        means = mean_over_batches(lambda batch, rng: self._try(batch, rng)[2], cases, self.batch_size)
        return means | {"loss": means["L_edit"] + self.method.locality_weight * means["L_loc"]}

    def _try(
        self, batch: Sequence[Case], rng: random.Random, *, learn: bool = False
    ) -> tuple[TokenFactors, dict[str, Tensor], dict[str, float]]:
        """(factors, ΔW of each matrix with its gradient if `learn`, what to show)."""
        examples = self.method.make_examples(without_instructions(batch), rng, edits_at_once=len(batch))
        with self.lower.given([text for example in examples for text in example.texts]):
            return self._read(examples, learn)

    def _read(self, examples: Sequence[Example], learn: bool) -> tuple[TokenFactors, dict[str, Tensor], dict]:
        rows = self.lm.encode([example.edit for example in examples])
        factors, _ = flat_factors(self.lm, self.module.names, rows, answers_only=True)
        if learn:
            self.module.observe(factors)
        deltas = {}
        with torch.no_grad():
            for name, v in self.module(factors).items():
                deltas[name] = (v.T @ self.module.weigh(name, factors[name][0])).requires_grad_(learn)  # (out, in)
        shown: dict[str, float] = {}
        for start in range(0, len(examples), _CASES_PER_PASS):
            read = self.method.read_examples(self.lm, examples[start : start + _CASES_PER_PASS])
            share = len(examples[start : start + _CASES_PER_PASS]) / len(examples)
            losses = read.losses(lambda _: delta_added(self.lm, deltas))
            if learn:
                (share * (losses.edit + self.method.locality_weight * losses.locality)).backward()
            for name, value in losses.named().items():
                shown[name] = shown.get(name, 0.0) + share * value
        return factors, deltas, shown
