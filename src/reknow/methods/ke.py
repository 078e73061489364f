"""KE, KnowledgeEditor: Editing Factual Knowledge in Language Models. De Cao, Aziz, Titov 2021, arXiv 2104.08164.

A network reads the edit as a sentence and says, for each matrix, how its gradient becomes an edit.

    h = tanh(A · BiLSTM("old >> new || prompt"));   r, c, r', c', η = MLP(h)      per matrix W (out, in)
    ΔW = σ(η) · (∇_W L ⊙ softmax(r) cᵀ + softmax(r') c'ᵀ)                                            (§3.2, eq. 7)

Trained under a constraint: the answer's loss as small as possible, while KL between the model before and after on
other facts stays below a margin, which is lowered while edits succeed. A multiplier λ ≥ 0 weighs the constraint and
rises with its violation:  min over the network, max over λ of  L + λ (KL − margin).                       (eq. 4, 5)

The gradient is Σ δ uᵀ over the tokens (`gradients`), so ΔW = σ(η) (Σ (δ ⊙ s)(u ⊙ c)ᵀ + s'c'ᵀ) is of low rank.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from reknow.checks.bounds import Formerly, Rank, Rate, Share, Units, Weight
from reknow.contract import Footprint, check_edits, make_patch
from reknow.edits import Case, Edit
from reknow.learning.editors import filled
from reknow.learning.examples import Outcome, averaged, bare
from reknow.learning.gradients import gradient_factors, matrices, used_rows
from reknow.learning.loop import seeded
from reknow.learning.settings import MatrixEditor
from reknow.learning.training import Learner, Training
from reknow.model.parts import embedding
from reknow.model.tokens import Text
from reknow.patching.deltas import as_delta
from reknow.patching.patches import Patch

if TYPE_CHECKING:
    from reknow.lm import LM

VALIDATED = 8
"""Validation cases that are read together."""
DIVERGENCE_WEIGHT = 10.0
"""Of KL against L when the best editor is chosen: the multiplier would change from one validation to the next."""


@dataclass(frozen=True)
class KE(MatrixEditor):
    """A network, trained once for a model, that reads an edit and changes its gradient."""

    lstm_width: Annotated[Rank, Formerly("read_width")] = 128
    """Of the LSTM in each direction."""
    width: Rank = 1024
    """Of h."""
    mlp_width: Annotated[Rank, Formerly("hidden")] = 128
    """Width of the hidden layer of each matrix's MLP."""
    units: Units = "relative"
    """relative: ∇L is scaled to ‖∇L‖ = ‖W‖ and softmax to mean 1, so that c is in units of the matrix in every model;
    absolute: ∇L as it is and softmax with sum 1, as in the authors' code."""
    smoothing: Share = 0.1
    """Label smoothing of L."""
    margin: Weight = 1e-3
    """Largest KL at the start, in nats per token."""
    min_margin: Annotated[Weight, Formerly("least_margin")] = 1e-5
    """The margin is × 0.8 after every validation in which more than nine of ten edits succeed, down to this."""
    learning_rate: Rate = 3e-4
    """Of RMSprop, for the network."""
    multiplier_learning_rate: Annotated[Weight, Formerly("multiplier_rate")] = 0.1
    """Of RMSprop, for λ."""

    training: ClassVar[Training] = Training(steps=4000, batch_size=8, warmup=200, validate_every=250, decay=True)

    @property
    def name(self) -> str:
        return "ke"

    def learner(
        self, lm: LM, train_cases: Sequence[Case], validation_cases: Sequence[Case], training: Training
    ) -> Learner:
        return _Learner(self, lm)

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits)
        trained, tensors = self.trained(lm)
        network = filled(lambda: KENetwork(trained, lm), tensors)
        with torch.no_grad():
            changes, loss = network(lm, edits, [Text.asked(edit) for edit in edits])
        # Several edits: the sum of what each asks for.
        deltas = {
            name: as_delta(*used_rows(left.flatten(0, 1), right.flatten(0, 1)))
            for name, (left, right) in changes.items()
        }
        return make_patch(self, lm, edits, deltas, notes={"layers": list(network.layers), "loss": loss})

    def footprint(self, lm: LM) -> Footprint:
        trained, tensors = self.trained(lm)
        reader = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("reader."))
        rest = sum(tensor.numel() for tensor in tensors.values()) - reader
        return Footprint(list(trained.layers or ()), True, weights_per_token=reader, weights_per_edit=rest)

    def _network(self, lm: LM) -> KENetwork:
        with seeded(self.seed, "ke"):
            return KENetwork(self, lm).to(lm.device)


class KENetwork(nn.Module):
    """The reader, an MLP for each matrix, and what the training adapts: multiplier and margin."""

    margin: Tensor

    def __init__(self, method: KE, lm: LM):
        super().__init__()
        assert method.layers is not None
        self.layers, self.names, self.absolute = (
            method.layers,
            matrices(lm, method.layers),
            method.units == "absolute",
        )
        self.reader = nn.LSTM(embedding(lm.model).shape[1], method.lstm_width, bidirectional=True, batch_first=True)
        self.summary = nn.Linear(2 * method.lstm_width, method.width)
        self.sizes = {name: tuple(lm.base_weight(name).shape) for name in self.names}
        self.norms = {name: float(lm.base_weight(name).float().norm()) for name in self.names}
        self.heads = nn.ModuleList([_head(method, *self.sizes[name]) for name in self.names])
        self.multiplier = nn.Parameter(torch.ones(()))
        self.register_buffer("margin", torch.tensor(method.margin))

    def forward(
        self, lm: LM, edits: Sequence[Edit], texts: Sequence[Text]
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
        """name → (left, right) of each edit's ΔW = leftᵀ right, and the mean loss of the answers before.

        (edits, columns + 1, out), (edits, columns + 1, in)
        """
        factors, loss = gradient_factors(lm, self.names, lm.encode(texts))
        state = self.read(lm, edits)  # (edits, width)
        changes = {}
        for name, head in zip(self.names, self.heads, strict=True):
            out, inside = self.sizes[name]
            c, r, c_free, r_free, gate = head(state).split([inside, out, inside, out, 1], 1)
            scale = 1.0 if self.absolute else float(out)
            left, right = (scale * r.softmax(1))[:, None], c[:, None]  # (edits, 1, features)
            found = factors[name]
            keep = found.keep[..., None]
            delta, u = found.delta * keep, found.u * keep
            if not self.absolute:
                gram = (delta @ delta.transpose(1, 2)) * (u @ u.transpose(1, 2))
                norm = gram.sum((1, 2)).clamp(min=1e-30).sqrt()  # of each edit's gradient
                delta = delta * (self.norms[name] / norm)[:, None, None]
            free = (scale * r_free.softmax(1))[:, None]
            left, right = torch.cat([delta * left, free], 1), torch.cat([u * right, c_free[:, None]], 1)
            changes[name] = (gate.sigmoid()[:, None] * left, right)
        return changes, loss

    def read(self, lm: LM, edits: Sequence[Edit]) -> Tensor:
        """What the reader makes of the edits. (edits, width)"""
        texts = [f"{edit.target_true or ''} >> {edit.target_new} || {edit.text}" for edit in edits]
        rows = [list(row.ids) for row in lm.encode([Text(text) for text in texts])]
        lengths = [len(ids) for ids in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for row, one in zip(ids, rows, strict=True):
            row[: len(one)] = torch.tensor(one)
        words = embedding(lm.model)[ids.to(lm.device)].detach().float()  # (edits, columns, embedding)
        packed = nn.utils.rnn.pack_padded_sequence(
            words, torch.tensor(lengths), batch_first=True, enforce_sorted=False
        )
        _, (last, _) = self.reader(packed)  # (2, edits, lstm_width), each direction's last state
        return torch.tanh(self.summary(torch.cat([last[0], last[1]], 1)))


def _head(method: KE, out: int, inside: int) -> nn.Sequential:
    """h → c, r, c', r', η of one matrix."""
    return nn.Sequential(
        weight_norm(nn.Linear(method.width, method.mlp_width)),
        nn.Tanh(),
        weight_norm(nn.Linear(method.mlp_width, 2 * (out + inside) + 1)),
    )


class _Learner:
    """KE's training step: descent for the network, ascent for the multiplier."""

    def __init__(self, method: KE, lm: LM):
        self.method, self.lm = method, lm
        self.module = method._network(lm)

    def optimizer(self) -> torch.optim.Optimizer:
        rest = [p for name, p in self.module.named_parameters() if name != "multiplier"]
        return torch.optim.RMSprop(
            [
                {"params": rest, "lr": self.method.learning_rate},
                {"params": [self.module.multiplier], "lr": self.method.multiplier_learning_rate},
            ],
            centered=True,
        )

    def loss(self, batch: Sequence[Case], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        network = self.module
        with torch.no_grad():
            network.multiplier.clamp_(min=0)
        outcome = self._trial(batch, rng)
        excess = outcome.stay - network.margin
        # The multiplier goes up the gradient that the network goes down.
        loss = outcome.edit + network.multiplier.detach() * excess - network.multiplier * excess.detach()
        return loss, outcome.shown() | {"multiplier": network.multiplier.item(), "margin": network.margin.item()}

    @torch.no_grad()
    def validate(self, cases: Sequence[Case]) -> dict[str, float]:
        found = averaged(lambda part, rng: self._trial(part, rng).shown(), cases, VALIDATED)
        if found["made"] > 0.9:
            self.module.margin.mul_(0.8).clamp_(min=self.method.min_margin)
        return found | {"loss": found["L_edit"] + DIVERGENCE_WEIGHT * found["L_loc"]}

    def _trial(self, batch: Sequence[Case], rng: random.Random) -> Outcome:
        found = self.method.lessons(bare(batch), rng)
        changes, _ = self.module(self.lm, [case.edit for case in batch], [lesson.edit for lesson in found])
        return self.method.exam(self.lm, found).read(changes, smoothing=self.method.smoothing)
