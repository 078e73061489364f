"""Fine-tuning of value matrices on the edits: the baselines of the field.

* FT-L (Meng et al. 2022, arXiv 2202.05262, §3.1): every token of the answer is predicted from the last token of the
  prompt, and no weight moves farther than a bound (L∞). That loss is a flaw, since later tokens never see the earlier
  ones, but published tables rest on it.
* FT-M (Zhang et al. 2024, arXiv 2401.01286, §3): cross-entropy of the answer's tokens, teacher-forced.
* FT-T (Qi et al. 2024, arXiv 2406.11194): the same over prompt and answer.
* FT-UKE (Xiong, Tan, Chen 2025, arXiv 2506.09672): FT-M for answers that are texts, with an end token behind them.
* LocFT-BF (Yang et al. 2025, arXiv 2509.22072): FT-M over many edits breadth-first, in shuffled batches, with an end
  token behind the answer: what other methods should be compared with where edits are many.

    min over W of  mean over edits of  −(1/T) Σ_t log P(token_t | …),   |W − W₀|∞ ≤ clamp
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch

from reknow.checks.bounds import NonNegative, Number, Seed
from reknow.contract import Method, check_edits, make_patch
from reknow.editing.descent import StepSize, TrainableMatrices, descend
from reknow.editing.independent_deltas import is_addition, train_each
from reknow.editing.layers import resolve_layer, resolve_layers
from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.parts import matrices_of
from reknow.model.scored_tokens import ScoredTokens, predictions
from reknow.model.tokens import EncodedText, Text
from reknow.patching.deltas import Dense
from reknow.patching.patches import Patch

_Loss = Literal["last_token", "target", "text"]
_Matrices = Literal["value", "mlp", "attention", "all"]
_NAMES: dict[str, str] = {"last_token": "ft-l", "target": "ft-m", "text": "ft-t"}

_REUSED_TOKENS = 200_000
"""Up to how many tokens the states below the trained layers are kept for the next pass, since they take memory."""


@dataclass(frozen=True)
class FT(StepSize, Method):
    """Fine-tuning of one or more value matrices, several edits at once."""

    edits_per_call = 32

    loss: _Loss = "target"
    """What is predicted: the answer from the prompt's last token alone, the answer token by token, or all text."""
    layer: int | tuple[int, ...] | None = None
    """Layer, or layers, whose value matrix is trained; None: `suggest_layer`."""
    span: Number = 1
    """So many layers around `suggest_layer` where none is given; 5 for the baselines of ICE's article."""
    steps: Number = 25
    """Passes over all edits."""
    stop_loss: NonNegative = 1e-2
    """End when the mean loss is below; a batch below is not trained on."""
    batch_size: Number = 32
    """Edits per update; edits of similar length share a batch."""
    matrices: _Matrices = "value"
    """Which matrices of a layer are trained: the MLP's value matrix, all of the MLP, all of attention, or all."""
    end_token: bool = False
    """Whether the end token, if there is one, is learned behind every answer, so that the model stops there; always
    if `breadth_first`."""
    breadth_first: bool = False
    """LocFT-BF: batches in another random order on every pass."""
    seed: Seed = 0
    """Seed of the order in which batches come when `breadth_first`."""

    @property
    def name(self) -> str:
        if self.breadth_first:
            return "locft-bf"
        return "ft-uke" if self.end_token and self.loss == "target" else _NAMES[self.loss]

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, layers = check_edits(self, edits, lm), self._layers(lm)
        if len(edits) == 1 and self._is_addition(lm, layers):
            return self._train_each(lm, edits, layers[0])[0]
        matrices = TrainableMatrices(lm, [name for layer in layers for name in self._names(lm, layer)], self)
        batches = self._batches(lm, edits, layers[0])
        with matrices.in_use(), torch.enable_grad():
            passes = descend(
                [batch.row_nll for batch in batches],
                lambda losses, running: matrices.step(losses.mean()),
                self.steps,
                lambda losses: losses.mean() < self.stop_loss,
                shuffle=torch.Generator().manual_seed(self.seed) if self.breadth_first else None,
            )
        notes = {"layer": layers[0] if len(layers) == 1 else layers, "losses": [fmean(losses) for losses in passes]}
        return make_patch(self, lm, edits, matrices.deltas(), notes=notes)

    def edit_each(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        edits, layers = [check_edits(self, edit, lm)[0] for edit in edits], self._layers(lm)
        if not self._is_addition(lm, layers):
            return super().edit_each(lm, edits)
        return self._train_each(lm, edits, layers[0])

    def _is_addition(self, lm: LM, layers: Sequence[int]) -> bool:
        return self.matrices == "value" and is_addition(lm, layers)

    def _names(self, lm: LM, layer: int) -> list[str]:
        """The matrices of a layer that are trained."""
        if self.matrices in ("value", "mlp"):
            return [*(lm.mlp_in(layer) if self.matrices == "mlp" else ()), lm.parts.value[layer]]
        within = lm.parts.attention_out[layer].rpartition(".")[0] if self.matrices == "attention" else ""
        return [name for name in matrices_of(lm.model, lm.parts.blocks[layer]) if name.startswith(within)]

    def _train_each(self, lm: LM, edits: Sequence[Edit], layer: int) -> list[Patch]:
        """A patch of each edit by itself, each for the model as it is; what is added is trained for all together."""
        rows = self._rows(lm, edits)
        pairs = [_scored(row, self.loss) for row in rows]
        trained = train_each(
            lm, rows, pairs, layer, self, steps=self.steps, stop_loss=self.stop_loss, batch_size=self.batch_size
        )
        return [
            make_patch(
                self, lm, [edit], {lm.parts.value[layer]: Dense(change)}, notes={"layer": layer, "losses": losses}
            )
            for edit, (change, losses) in zip(edits, trained, strict=True)
        ]

    def _layers(self, lm: LM) -> list[int]:
        if isinstance(self.layer, int):
            return [resolve_layer(lm, self.layer)]
        return resolve_layers(lm, self.layer, self.span)

    def _rows(self, lm: LM, edits: Sequence[Edit]) -> list[EncodedText]:
        rows = lm.encode([Text.asked(edit) for edit in edits])
        if (self.breadth_first or self.end_token) and lm.tokenizer.eos_token_id is not None:
            rows = [EncodedText((*row.ids, lm.tokenizer.eos_token_id), row.prompt_length) for row in rows]
        return rows

    def _batches(self, lm: LM, edits: Sequence[Edit], lowest: int) -> list[ScoredTokens]:
        rows = sorted(self._rows(lm, edits), key=lambda row: len(row.ids))
        reused = lowest if sum(len(row.ids) for row in rows) <= _REUSED_TOKENS else None
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        return [ScoredTokens(lm, batch, [_scored(row, self.loss) for row in batch], reused) for batch in batches]


def _scored(row: EncodedText, loss: _Loss) -> list[tuple[int, int]]:
    """(index of the token that predicts, token predicted) of everything that enters the loss."""
    if loss == "last_token":
        return [(row.prompt_length - 1, token) for token in row.target_ids]
    return predictions(row, row.prompt_length if loss == "target" else 1)
