"""Changes of one matrix for many edits that know nothing of each other: fine-tuning edit by edit in one batch.

The matrix's input is the same whatever the change, so a change is an addition behind it: Δ k for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reknow.editing.descent import StepSize, descend
from reknow.model.hooks import fused_gelu
from reknow.model.scored_tokens import ScoredTokens
from reknow.model.tokens import Row

if TYPE_CHECKING:
    from reknow.lm import LM

__all__ = ["TRAINED_WEIGHTS", "IndependentDeltas", "is_addition", "train_each"]

TRAINED_WEIGHTS = 2**26
"""How many weights changes that are trained together may have in all; Adam and gradients hold as many thrice."""


def is_addition(lm: LM, layers: Sequence[int]) -> bool:
    """Whether a change of the one value matrix of these layers is an addition to its block's output."""
    return len(layers) == 1 and lm.parts.replayable and lm.parts.residual_identity and not lm.hooked


def train_each(
    lm: LM,
    rows: Sequence[Row],
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
    weight = lm.weight(lm.parts.value[layer])
    count = max(1, min(batch_size, TRAINED_WEIGHTS // weight.numel()))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    trained: dict[int, tuple[Tensor, list[float]]] = {}
    for part in (order[start : start + count] for start in range(0, len(order), count)):
        deltas = IndependentDeltas(weight, len(part), step_size)
        here = _Rows(lm, [rows[i] for i in part], [pairs[i] for i in part], layer, deltas)
        passes = descend([here.losses], here.update, steps, lambda losses: losses < stop_loss, progress=lm.progress)
        for number, i in enumerate(part):
            course = [losses[number] for losses in passes]
            end = next((step for step, loss in enumerate(course, 1) if loss < stop_loss), len(course))
            trained[i] = deltas.changes[number].clone(), course[:end]
    return [trained[i] for i in range(len(rows))]


class _Rows:
    """Some rows with a change each; those that are finished leave the batch."""

    def __init__(
        self,
        lm: LM,
        rows: Sequence[Row],
        pairs: Sequence[Sequence[tuple[int, int]]],
        layer: int,
        deltas: IndependentDeltas,
    ):
        self._lm, self._rows, self._pairs, self._layer, self._deltas = lm, rows, pairs, layer, deltas
        self._running = list(range(len(rows)))
        self._read()

    def _read(self) -> None:
        rows, pairs = [self._rows[i] for i in self._running], [self._pairs[i] for i in self._running]
        self._inside, self._scored = self._running, ScoredTokens(self._lm, rows, pairs, self._layer)

    def losses(self) -> Tensor:
        """Mean loss of each row's scored tokens; 0 for those that have left. (rows,)"""
        if 4 * len(self._running) <= 3 * len(self._inside):
            self._read()
        with fused_gelu(self._lm.model), torch.enable_grad():
            found = self._scored.row_nll(self._deltas.added(self._scored.keys, self._inside))
            places = torch.tensor(self._inside, device=found.device)
            return found.new_zeros(len(self._rows)).index_put((places,), found)

    def update(self, losses: Tensor, running: Tensor) -> None:
        self._running = running.nonzero()[:, 0].tolist()
        self._deltas.step(losses, self._running)


class IndependentDeltas:
    """Changes of one matrix, a row of tokens each.

    Args:
        weight: the matrix. (out, in)
        count: how many changes.
    """

    def __init__(self, weight: Tensor, count: int, step_size: StepSize):
        rate, self._bound = step_size.of(weight.float())
        self.changes = [torch.zeros_like(weight, dtype=torch.float32) for _ in range(count)]
        self._optimizer = torch.optim.Adam(self.changes, lr=rate, fused=True)
        self._rows: list[int] = []
        self._block: Tensor  # the changes of these rows, (rows, out, in)
        self._slopes: Tensor  # their gradients; memory that is new in every step would take longer than the product

    def added(self, keys: Tensor, which: Sequence[int]) -> Tensor:
        """What each row's own change adds to the outputs. (rows, columns, in) → (rows, columns, out)"""
        if self._rows != which:
            self._gather(which)
        self._keys = keys.float()
        self._added = (self._keys @ self._block.mT).requires_grad_()
        return self._added

    def step(self, losses: Tensor, running: Sequence[int]) -> None:
        """One update of each `running` change against its own loss, which was read with what was added; the others
        stay."""
        (slope,) = torch.autograd.grad(losses, self._added, torch.ones_like(losses))  # (rows, columns, out)
        torch.bmm(slope.mT, self._keys, out=self._slopes)
        going = set(running)
        for i, own in zip(self._rows, self._slopes, strict=True):
            self.changes[i].grad = own if i in going else None
        self._optimizer.step()
        for i in running if self._bound < float("inf") else ():
            self.changes[i].clamp_(-self._bound, self._bound)

    def _gather(self, which: Sequence[int]) -> None:
        """Lays these changes side by side in memory, where products read all of them and the optimizer each."""
        for i in self._rows:
            self.changes[i].grad = None
            self.changes[i].data = self.changes[i].clone()  # those that leave would hold the memory of all
        self._rows, self._block = list(which), torch.stack([self.changes[i] for i in which])
        self._slopes = torch.empty_like(self._block)
        for i, change in zip(which, self._block, strict=True):
            self.changes[i].data = change
