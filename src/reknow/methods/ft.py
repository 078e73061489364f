"""Fine-tuning of value matrices on the edits: the baselines of the field.

* FT-L (Meng et al. 2022, arXiv 2202.05262, §3.1): every token of the answer is predicted from the last token of the
  prompt, and no weight moves farther than a bound (L∞). That loss is a flaw, since later tokens never see the earlier
  ones, but published tables rest on it.
* FT-M (Zhang et al. 2024, arXiv 2401.01286, §3): cross-entropy of the answer's tokens, teacher-forced.
* FT-T (Qi et al. 2024, arXiv 2406.11194): the same over prompt and answer.
* LocFT-BF (Yang et al. 2025, arXiv 2509.22072): FT-M over many edits breadth-first, in shuffled batches, with an end
  token behind the answer. The honest baseline at scale.

    min over W of  mean over edits of  −(1/T) Σ_t log P(token_t | …),   |W − W₀|∞ ≤ clamp
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from reknow.checks.bounds import Number, Rate, Seed, Weight
from reknow.contract import Method, check_edits, make_patch
from reknow.editing.descent import Matrices, Pace, Scored, SideBySide, predicted
from reknow.editing.layers import resolve_layer, resolve_layers
from reknow.edits import Edit
from reknow.model.exact import finite_loss
from reknow.model.hooks import fused_gelu
from reknow.model.tokens import Row, Text
from reknow.patching.deltas import Dense
from reknow.patching.patches import Patch
from reknow.progress import told

if TYPE_CHECKING:
    from reknow.lm import LM

Loss = Literal["last_token", "target", "text"]
NAMES: dict[str, str] = {"last_token": "ft-l", "target": "ft-m", "text": "ft-t"}

TRAINED_WEIGHTS = 2**26
"""How many weights edits that are trained side by side may have in all; Adam and gradients hold as many thrice."""

REUSED_TOKENS = 200_000
"""Up to how many tokens the states below the trained layers are kept for the next pass, since they take memory."""


@dataclass(frozen=True)
class FT(Method):
    """Fine-tuning of one or more value matrices, several edits at once."""

    edits_per_call = 32

    loss: Loss = "target"
    """What is predicted: the answer from the prompt's last token alone, the answer token by token, or all text."""
    layer: int | tuple[int, ...] | None = None
    """Layer, or layers, whose value matrix is trained; None: `suggest_layer`."""
    span: Number = 1
    """So many layers around `suggest_layer` where none is given; 5 for the baselines of ICE's article."""
    steps: Number = 25
    """Passes over all edits."""
    learning_rate: Rate = 0.01
    """Of Adam, in units of the matrix's root mean square, so that it means the same in every model."""
    learning_rate_absolute: Rate | None = None
    """The same as a number, as the papers give it (5e-4); then it holds."""
    clamp: Weight | None = None
    """Largest change of a single weight, in units of the matrix's root mean square; None: no bound."""
    clamp_absolute: Weight | None = None
    """The same as a number, as the papers give it."""
    stop_loss: Weight = 1e-2
    """End when the mean loss is below; a batch below is not trained on."""
    batch_size: Number = 32
    """Edits per update; edits of similar length share a batch."""
    breadth_first: bool = False
    """LocFT-BF: batches in another random order on every pass, and the end token behind every answer is learned."""
    seed: Seed = 0
    """Of that order."""

    @property
    def name(self) -> str:
        return "locft-bf" if self.breadth_first else NAMES[self.loss]

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, layers = check_edits(self, edits), self._layers(lm)
        if len(edits) == 1 and _addable(lm, layers):
            return self.edit_each(lm, edits)[0]
        matrices = Matrices(lm, [lm.parts.value[layer] for layer in layers], self._pace)
        batches = self._batches(lm, edits, layers[0])
        with matrices.in_use(), torch.enable_grad():
            losses = self._descend(batches, matrices)
        notes = {"layer": layers[0] if len(layers) == 1 else layers, "losses": losses}
        return make_patch(self, lm, edits, matrices.deltas(), notes=notes)

    def edit_each(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        edits, layers = [one for edit in edits for one in check_edits(self, edit)], self._layers(lm)
        if not _addable(lm, layers):
            return super().edit_each(lm, edits)
        rows, name = self._rows(lm, edits), lm.parts.value[layers[0]]
        order = sorted(range(len(edits)), key=lambda i: len(rows[i].ids))
        count = max(1, min(self.batch_size, TRAINED_WEIGHTS // lm.weight(name).numel()))
        patches: dict[int, Patch] = {}
        for part in (order[i : i + count] for i in range(0, len(order), count)):
            changes, losses = self._apart(lm, [rows[i] for i in part], layers[0])
            for i, change, course in zip(part, changes, losses, strict=True):
                notes = {"layer": layers[0], "losses": course}
                patches[i] = make_patch(self, lm, [edits[i]], {name: Dense(change.clone())}, notes=notes)
        return [patches[i] for i in range(len(edits))]

    def _apart(self, lm: LM, rows: Sequence[Row], layer: int) -> tuple[list[Tensor], list[list[float]]]:
        """A change of the layer's value matrix for every row by itself, and the row's losses."""
        side = SideBySide(lm.weight(lm.parts.value[layer]), len(rows), self._pace)
        losses: list[list[float]] = [[] for _ in rows]
        running = inside = list(range(len(rows)))
        batch = _Batch(lm, rows, self.loss, layer)
        for step in range(self.steps):
            if 4 * len(running) <= 3 * len(inside):  # finished rows leave
                inside = running
                batch = _Batch(lm, [rows[i] for i in inside], self.loss, layer)
            with fused_gelu(lm.model), torch.enable_grad():
                found = batch.losses(side.added(batch.keys, inside))
                finite_loss(found.sum())
                values = dict(zip(inside, found.tolist(), strict=True))
                for i in running:
                    losses[i].append(values[i])
                running = [i for i in running if values[i] >= self.stop_loss]
                told(step, self.steps, fmean(values.values()))
                if not running:
                    break
                side.step(found, running)
        return side.changes, losses

    @property
    def _pace(self) -> Pace:
        return Pace(self.learning_rate, self.learning_rate_absolute, self.clamp, self.clamp_absolute)

    def _layers(self, lm: LM) -> list[int]:
        if isinstance(self.layer, int):
            return [resolve_layer(lm, self.layer)]
        return resolve_layers(lm, self.layer, self.span)

    def _rows(self, lm: LM, edits: Sequence[Edit]) -> list[Row]:
        rows = lm.encode([Text.asked(edit) for edit in edits])
        if self.breadth_first and lm.tokenizer.eos_token_id is not None:
            rows = [Row((*row.ids, lm.tokenizer.eos_token_id), row.prompt_length) for row in rows]
        return rows

    def _batches(self, lm: LM, edits: Sequence[Edit], lowest: int) -> list[_Batch]:
        rows = self._rows(lm, edits)
        rows.sort(key=lambda row: len(row.ids))
        kept = lowest if sum(len(row.ids) for row in rows) <= REUSED_TOKENS else None
        return [
            _Batch(lm, rows[i : i + self.batch_size], self.loss, kept) for i in range(0, len(rows), self.batch_size)
        ]

    def _descend(self, batches: list[_Batch], matrices: Matrices) -> list[float]:
        generator = torch.Generator().manual_seed(self.seed)
        order = list(range(len(batches)))
        losses: list[float] = []
        for step in range(self.steps):
            if self.breadth_first:
                order = torch.randperm(len(batches), generator=generator).tolist()
            total, count = 0.0, 0
            for batch in (batches[i] for i in order):
                loss = batch.loss()
                value = finite_loss(loss)
                total, count = total + value * batch.size, count + batch.size
                if value >= self.stop_loss:
                    matrices.step(loss)
            losses.append(total / count)
            told(step, self.steps, losses[-1])
            if losses[-1] < self.stop_loss:
                break
        return losses


class _Batch:
    """Some edits and the tokens of theirs that are scored."""

    def __init__(self, lm: LM, rows: Sequence[Row], loss: Loss, layer: int | None):
        pairs = [_scored(row, loss) for row in rows]
        self.size = len(rows)
        self._scored = Scored(lm, rows, pairs, layer)
        lengths = torch.tensor([len(scored) for scored in pairs], device=lm.device)
        self._weights = 1 / lengths[self._scored.of_row]  # (n,)

    @property
    def keys(self) -> Tensor:
        """Input of the layer's value matrix. (edits, columns, in)"""
        return self._scored.keys

    def loss(self) -> Tensor:
        """Mean over edits of the mean NLL of their scored tokens, with the weights as they are now."""
        return self.losses().mean()

    def losses(self, added: Tensor | None = None) -> Tensor:
        """The same per edit, with what is `added` at the output of the layer's value matrix. (edits,)"""
        nll = self._scored.nll(added) * self._weights
        return nll.new_zeros(self.size).index_add(0, self._scored.of_row, nll)


def _addable(lm: LM, layers: Sequence[int]) -> bool:
    """Whether a change of the one value matrix is an addition to its block's output."""
    return len(layers) == 1 and lm.parts.replayable and lm.parts.residual_identity and not lm.hooked


def _scored(row: Row, loss: Loss) -> list[tuple[int, int]]:
    """(index of the token that predicts, token predicted) of everything that enters the loss."""
    if loss == "last_token":
        return [(row.prompt_length - 1, token) for token in row.target_ids]
    return predicted(row, row.prompt_length if loss == "target" else 1)
