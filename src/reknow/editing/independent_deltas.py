"""Changes of one matrix for many edits that know nothing of each other: fine-tuning edit by edit in one batch.

The matrix's input is the same whatever the change, so a change is an addition behind it: Δ k for every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reknow.editing.descent import StepSize, descend
from reknow.lm import LM
from reknow.model.scored_tokens import ScoredTokens
from reknow.model.tokens import EncodedText
from reknow.progress import progress

__all__ = ["is_addition", "train_each"]

_TRAINED_WEIGHTS = 2**26
"""How many weights changes that are trained together may have in all; Adam and gradients hold as many thrice."""


def is_addition(lm: LM, layers: Sequence[int]) -> bool:
    """Whether a change of the one value matrix of these layers is an addition to its block's output."""
    return len(layers) == 1 and lm.parts.replayable and lm.parts.residual_identity and not lm.hooked


def train_each(
    lm: LM,
    rows: Sequence[EncodedText],
    pairs: Sequence[Sequence[tuple[int, int]]],
    layer: int,
    step_size: StepSize,
    *,
    steps: int,
    stop_loss: float,
    batch_size: int,
) -> list[tuple[Tensor, list[float]]]:
    """For every row a change of the layer's value matrix (out, in), and the row's losses until its own end.

    Args:
        pairs: what of the rows is scored, as in `ScoredTokens`.
        steps: updates of a row at most.
        stop_loss: a row is finished when its mean loss (nats a token) is below.
        batch_size: rows at a time, at most.
    """
    count = max(1, min(batch_size, _TRAINED_WEIGHTS // lm.weight(lm.parts.value[layer]).numel()))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    trained: dict[int, tuple[Tensor, list[float]]] = {}
    parts = [order[start : start + count] for start in range(0, len(order), count)]
    for part in progress.each("edits", parts, unit="batches"):
        deltas = _IndependentDeltas(lm, [rows[i] for i in part], [pairs[i] for i in part], layer, step_size)
        passes = descend([deltas.losses], deltas.update, steps, lambda losses: losses < stop_loss)
        for i, change, course in zip(part, deltas.changes, zip(*passes, strict=True), strict=True):
            end = next((step for step, loss in enumerate(course, 1) if loss < stop_loss), len(course))
            trained[i] = change.clone(), list(course[:end])
    return [trained[i] for i in range(len(rows))]


class _IndependentDeltas:
    """A change of the layer's value matrix for each of some rows; rows that are finished leave the batch."""

    def __init__(
        self,
        lm: LM,
        rows: Sequence[EncodedText],
        pairs: Sequence[Sequence[tuple[int, int]]],
        layer: int,
        step_size: StepSize,
    ):
        self._lm, self._rows, self._pairs, self._layer = lm, rows, pairs, layer
        weight = lm.weight(lm.parts.value[layer])
        rate, self._bound = step_size.of(weight.float())
        self.changes = [torch.zeros_like(weight, dtype=torch.float32) for _ in rows]  # (out, in)
        self._optimizer = torch.optim.Adam(self.changes, lr=rate, fused=True)
        self._inside: list[int] = []
        self._read(list(range(len(rows))))

    def _read(self, inside: list[int]) -> None:
        """From now on these rows are read, and their changes lie side by side in memory, where products read all of
        them and the optimizer each."""
        for i in self._inside:
            self.changes[i].grad = None
            self.changes[i].data = self.changes[i].clone()  # those that leave would hold the memory of all
        rows, pairs = [self._rows[i] for i in inside], [self._pairs[i] for i in inside]
        self._inside = self._running = inside
        self._scored = ScoredTokens(self._lm, rows, pairs, self._layer)
        self._keys = self._scored.keys.float()  # (rows, columns, in)
        self._block = torch.stack([self.changes[i] for i in inside])  # (rows, out, in)
        # Their gradients; memory that is new in every step would take longer than the product.
        self._slopes = torch.empty_like(self._block)
        for i, change in zip(inside, self._block, strict=True):
            self.changes[i].data = change

    def losses(self) -> Tensor:
        """Mean loss of each row's scored tokens; 0 for those that have left. (rows,)"""
        if 4 * len(self._running) <= 3 * len(self._inside):
            self._read(self._running)
        with torch.enable_grad():
            self._added = (self._keys @ self._block.mT).requires_grad_()  # (rows, columns, out)
            nll = self._scored.row_nll(self._added)
            return nll.new_zeros(len(self._rows)).index_put((torch.tensor(self._inside, device=nll.device),), nll)

    def update(self, losses: Tensor, running: Tensor) -> None:
        """One update of each running row's change against its own loss; the others stay."""
        self._running = running.nonzero()[:, 0].tolist()
        (slope,) = torch.autograd.grad(losses, self._added, torch.ones_like(losses))
        torch.bmm(slope.mT, self._keys, out=self._slopes)
        going = set(self._running)
        for i, slope in zip(self._inside, self._slopes, strict=True):
            self.changes[i].grad = slope if i in going else None
        self._optimizer.step()
        for i in self._running if self._bound < float("inf") else ():
            self.changes[i].clamp_(-self._bound, self._bound)
