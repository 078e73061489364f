"""KE, KnowledgeEditor: Editing Factual Knowledge in Language Models. De Cao, Aziz, Titov 2021, arXiv 2104.08164.

A network reads the edit as a sentence and says, for each matrix, how its gradient becomes an edit.

    h = tanh(A · BiLSTM("old >> new || prompt"));   r, c, r', c', η = MLP(h)      per matrix W (out, in)
    ΔW = σ(η) · (∇_W L ⊙ softmax(r) cᵀ + softmax(r') c'ᵀ)                                            (§3.2, eq. 7)

Trained under a constraint: the answer's loss as small as possible, while KL between the model before and after on
other facts stays below a margin, which is lowered while edits succeed. A multiplier λ ≥ 0 weighs the constraint and
rises with its violation:  min over the network, max over λ of  L + λ (KL − margin).                       (eq. 4, 5)

The gradient is Σ δ uᵀ over the tokens (`gradients`), so ΔW = σ(η) (Σ (δ ⊙ s)(u ⊙ c)ᵀ + s'c'ᵀ) is of low rank. The
paper's loop adds the same ΔW again until the model says the answer: `max_repeats`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from typing_extensions import Self

from reknow.checks.bounds import Formerly, NonNegative, Number, Rank, Rate, Share, Units
from reknow.edits import Case, Edit
from reknow.learning.editors import fill_network
from reknow.learning.examples import Losses, mean_over_batches, without_instructions
from reknow.learning.gradients import TokenFactors, gradient_factors, mlp_matrices, repeated_deltas, row_changes
from reknow.learning.loop import seeded
from reknow.learning.lower_states import LowerStates
from reknow.learning.settings import Changes, MatrixEditor, Tensors
from reknow.learning.training import Learner, Split, Training, parameter_groups
from reknow.lm import LM
from reknow.model.parts import embedding_matrix
from reknow.model.tokens import Text
from reknow.patching.record import Footprint

_VALIDATION_BATCH = 8
"""Validation cases that are read at once."""
_DIVERGENCE_WEIGHT = 10.0
"""Weight of KL against L when the best editor is chosen: the multiplier would change between two validations."""


@dataclass(frozen=True)
class KE(MatrixEditor):
    """A network, trained once for a model, that reads an edit and changes its gradient."""

    lstm_width: Annotated[Rank, Formerly("read_width")] = 128
    """Width of the LSTM in each direction."""
    width: Rank = 1024
    """Width of h, what the LSTM makes of the edit."""
    mlp_width: Annotated[Rank, Formerly("hidden")] = 128
    """Width of the hidden layer of each matrix's MLP."""
    units: Units = "relative"
    """relative: ∇L is scaled to ‖∇L‖ = ‖W‖ and softmax to mean 1, so that c is in units of the matrix in every model;
    absolute: ∇L as it is and softmax with sum 1, as in the authors' code."""
    max_scale: Rate = 1.0
    """Factor of σ(η), as in the authors' code: lower where untrained edits spoil the model."""
    smoothing: Share = 0.1
    """Label smoothing of the answer's loss L."""
    margin: NonNegative = 1e-3
    """Largest KL at the start of the training, in nats per token."""
    min_margin: Annotated[NonNegative, Formerly("least_margin")] = 1e-5
    """Smallest margin: it is × 0.8 after every validation in which more than nine of ten edits succeed."""
    learning_rate: Rate = 3e-4
    """Learning rate of RMSprop for the network."""
    multiplier_learning_rate: Annotated[NonNegative, Formerly("multiplier_rate")] = 0.1
    """Learning rate of RMSprop for the multiplier λ."""
    max_repeats: Number = 1
    """How often ΔW is added at most, until the model says the answer; 5 in the loop of the authors' evaluation."""

    training: ClassVar[Training] = Training(steps=4000, batch_size=8, warmup=200, validate_every=250, decay=True)

    @property
    def name(self) -> str:
        return "ke"

    def learner(self, lm: LM, cases: Split, training: Training) -> Learner:
        return _Learner(self, lm, self.lower_states(lm, cases, training))

    def transform(self, lm: LM, edits: Sequence[Edit], trained: Self, tensors: Tensors) -> Changes:
        network = fill_network(lambda: KENetwork(trained, lm), tensors)
        texts = [Text.asked(edit) for edit in edits]
        changes, loss = network(lm, edits, texts)
        # Several edits: the sum of what each asks for.
        total = {name: (left.flatten(0, 1), right.flatten(0, 1)) for name, (left, right) in changes.items()}
        return repeated_deltas(lm, lm.encode(texts), total, self.max_repeats), loss

    def footprint(self, lm: LM) -> Footprint:
        trained, tensors = self.load_trained(lm)
        reader = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("reader."))
        rest = sum(tensor.numel() for tensor in tensors.values()) - reader
        return Footprint(list(trained.layers or ()), True, weights_per_token=reader, weights_per_edit=rest)


class KENetwork(nn.Module):
    """The reader, an MLP for each matrix, and what the training adapts: multiplier and margin."""

    margin: Tensor

    def __init__(self, method: KE, lm: LM):
        super().__init__()
        assert method.layers is not None
        self.names, self.absolute = mlp_matrices(lm, method.layers), method.units == "absolute"
        weights = {name: lm.base_weight(name) for name in self.names}
        words = embedding_matrix(lm.model).shape[1]
        self.reader = nn.LSTM(words, method.lstm_width, bidirectional=True, batch_first=True)
        self.summary = nn.Linear(2 * method.lstm_width, method.width)
        self.sizes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}  # (out, in)
        self.norms = {name: float(weight.float().norm()) for name, weight in weights.items()}
        self.heads = nn.ModuleList([_head(method, *self.sizes[name]) for name in self.names])
        self.max_scale, self.multiplier = method.max_scale, nn.Parameter(torch.ones(()))
        self.register_buffer("margin", torch.tensor(method.margin))

    def forward(self, lm: LM, edits: Sequence[Edit], texts: Sequence[Text]) -> tuple[TokenFactors, float]:
        """name → (left (edits, columns + 1, out), right (edits, columns + 1, in)) of each edit's ΔW = leftᵀ right;
        and the mean loss of the answers before."""
        factors, loss = gradient_factors(lm, self.names, lm.encode(texts))
        state = self.read(lm, edits)  # (edits, width)
        changes = {}
        for name, head in zip(self.names, self.heads, strict=True):
            out, inside = self.sizes[name]
            c, r, c_free, r_free, gate = head(state).split([inside, out, inside, out, 1], 1)
            scale = 1.0 if self.absolute else float(out)
            left, right = (scale * r.softmax(1))[:, None], c[:, None]  # (edits, 1, features)
            keep = factors[name].keep[..., None]
            delta, u = factors[name].delta * keep, factors[name].u * keep
            if not self.absolute:
                gram = (delta @ delta.mT) * (u @ u.mT)
                norm = gram.sum((1, 2)).clamp(min=1e-30).sqrt()  # of each edit's gradient
                delta = delta * (self.norms[name] / norm)[:, None, None]
            free = (scale * r_free.softmax(1))[:, None]
            left, right = torch.cat([delta * left, free], 1), torch.cat([u * right, c_free[:, None]], 1)
            changes[name] = (self.max_scale * gate.sigmoid()[:, None] * left, right)
        return changes, loss

    def read(self, lm: LM, edits: Sequence[Edit]) -> Tensor:
        """What the reader makes of the edits. (edits, width)"""
        texts = [Text(f"{edit.target_true or ''} >> {edit.target_new} || {edit.text}") for edit in edits]
        vectors = embedding_matrix(lm.model).detach()
        words = [vectors[list(row.ids)].float() for row in lm.encode(texts)]  # (tokens, embedding) of each edit
        packed = nn.utils.rnn.pack_sequence(words, enforce_sorted=False)
        _, (last, _) = self.reader(packed)  # (2, edits, lstm_width), each direction's last state
        return torch.tanh(self.summary(torch.cat([last[0], last[1]], 1)))


def _head(method: KE, out: int, inside: int) -> nn.Sequential:
    """h → c, r, c', r', η of one matrix."""
    first, last = nn.Linear(method.width, method.mlp_width), nn.Linear(method.mlp_width, 2 * (out + inside) + 1)
    return nn.Sequential(weight_norm(first), nn.Tanh(), weight_norm(last))


class _Learner:
    """KE's training step: descent for the network, ascent for the multiplier."""

    def __init__(self, method: KE, lm: LM, lower: LowerStates):
        self.method, self.lm, self.lower = method, lm, lower
        with seeded(method.seed, "ke"):
            self.module = KENetwork(method, lm).to(lm.device)

    def optimizer(self) -> torch.optim.Optimizer:
        own = {"multiplier": self.method.multiplier_learning_rate}
        return torch.optim.RMSprop(parameter_groups(self.module, self.method.learning_rate, own), centered=True)

    def loss(self, batch: Sequence[Case], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        network = self.module
        network.multiplier.data.clamp_(min=0)
        losses = self._losses(batch, rng)
        excess = losses.locality - network.margin
        # The multiplier goes up the gradient that the network goes down.
        loss = losses.edit + network.multiplier.detach() * excess - network.multiplier * excess.detach()
        return loss, losses.named() | {"multiplier": network.multiplier.item(), "margin": network.margin.item()}

    @torch.no_grad()
    def validate(self, cases: Sequence[Case]) -> dict[str, float]:
        means = mean_over_batches(lambda batch, rng: self._losses(batch, rng).named(), cases, _VALIDATION_BATCH)
        if means["success"] > 0.9:
            self.module.margin.mul_(0.8).clamp_(min=self.method.min_margin)
        return means | {"loss": means["L_edit"] + _DIVERGENCE_WEIGHT * means["L_loc"]}

    def _losses(self, batch: Sequence[Case], rng: random.Random) -> Losses:
        examples = self.method.make_examples(without_instructions(batch), rng)
        with self.lower.given([text for example in examples for text in example.texts]):
            changes, _ = self.module(self.lm, [case.edit for case in batch], [example.edit for example in examples])
            read = self.method.read_examples(self.lm, examples)
            return read.losses(lambda numbers: row_changes(self.lm, changes, numbers), self.method.smoothing)
