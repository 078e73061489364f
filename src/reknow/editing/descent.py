"""Gradient descent in passes over batches of items, each of which ends by itself; and whole matrices to descend on.

An item is what has a loss and an end of its own: an edit, a value of a memory, a batch that shares weights. `descend`
knows nothing of models: batches give losses, an update moves what is trained.

Trained matrices are copies which the model uses while `TrainableMatrices.in_use` is open, so the model itself is
never changed, and only they get gradients: autograd keeps nothing of the blocks below the lowest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from reknow.checks.bounds import Formerly, Rate, Units
from reknow.lm import LM
from reknow.model.exact import finite_loss
from reknow.model.hooks import weight_replaced
from reknow.patching.deltas import Delta, Dense
from reknow.progress import progress

__all__ = ["StepSize", "TrainableMatrices", "Update", "adam_update", "descend"]

Update = Callable[[Tensor, Tensor], object]
"""(losses, running) → moves what belongs to the running items, against the losses of a batch."""


def descend(
    batches: Sequence[Callable[[], Tensor]],
    update: Update,
    steps: int,
    finished: Callable[[Tensor], Tensor],
    *,
    shuffle: torch.Generator | None = None,
    after_pass: Callable[[int], object] = lambda step: None,
) -> list[list]:
    """Passes over the batches, an update for each, until all items are finished; gives every pass's losses.

    Args:
        batches: each computes the losses of its items as things stand, with gradients. (items,), or (items, terms) of
            which the first is the whole loss
        update: called with a batch's losses and which of its items are running; not where none is.
        steps: passes at most.
        finished: which of these losses need no update any more, boolean: one per item, or one for all. It is asked
            for each batch before its update, and for the whole pass whether the descent is at its end.
        shuffle: draws another order of the batches for every pass; None: as they stand.
        after_pass: called with the number of the pass, from 0.

    Returns:
        Per pass the losses of all items in the order of `batches`, as they were before the batch's update.

    Raises:
        EditFailed: a loss is not finite.
    """
    order = list(range(len(batches)))
    passes: list[list] = []
    for step in progress.each("learning", range(steps), unit="passes", parts=1):
        if shuffle is not None:
            order = torch.randperm(len(batches), generator=shuffle).tolist()
        losses: dict[int, Tensor] = {}
        for i in progress.each("", order, parts=1):
            loss = batches[i]()
            finite_loss(loss.sum())
            losses[i] = loss.detach()
            running = ~finished(losses[i])
            if bool(running.any()):
                update(loss, running)
        after_pass(step)
        whole = torch.cat([losses[i] for i in range(len(batches))])
        passes.append(whole.tolist())
        progress.note(f"loss {float(whole.reshape(len(whole), -1)[:, 0].mean()):.3g}")
        if bool(finished(whole).all()):
            break
    return passes


def adam_update(optimizer: torch.optim.Optimizer, rows: Tensor | None = None, row_of: Tensor | None = None) -> Update:
    """An update of all that the optimizer moves, against the sum of the losses.

    Args:
        rows: a parameter with a row for each item; those of finished items stay as they are.
        row_of: (items,) the row of each item, where several share one; it moves while one of them runs.
    """

    def update(losses: Tensor, running: Tensor) -> None:
        before = None if rows is None else rows.detach().clone()
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        if rows is not None and before is not None:  # Adam's momentum would carry finished ones on
            running = running.to(rows.device)
            moving = running if row_of is None else running.new_zeros(len(rows)).index_fill(0, row_of[running], True)
            with torch.no_grad():
                rows.copy_(torch.where(moving[:, None], rows, before))

    return update


@dataclass(frozen=True)
class StepSize:
    """How fast and how far the weights of a matrix move: settings that methods of fine-tuning share."""

    learning_rate: Annotated[Rate, Formerly("learning_rate_absolute", also={"units": "absolute"})] = 0.01
    """How far Adam moves a weight in a step."""
    clamp: Annotated[Rate | None, Formerly("clamp_absolute", also={"units": "absolute"})] = None
    """Largest change of a single weight; None: no bound."""
    units: Units = "relative"
    """`relative`: learning rate and clamp are multiples of the matrix's root mean square, so that they mean the same
    in every model; `absolute`: they are plain numbers, as in the papers."""

    def of(self, weight: Tensor) -> tuple[float, float]:
        """(learning rate, largest change) of this matrix, as numbers."""
        unit = float(weight.square().mean().sqrt()) if self.units == "relative" else 1.0
        return self.learning_rate * unit, float("inf") if self.clamp is None else self.clamp * unit


class TrainableMatrices:
    """Copies of some matrices in float32, and the optimizer that moves them.

    Args:
        names: modules of `lm`.
        weight_decay: AdamW's, by which a weight shrinks in each step, times the learning rate.
    """

    def __init__(self, lm: LM, names: Sequence[str], step_size: StepSize, *, weight_decay: float = 0.0):
        self._lm = lm
        self._start = {name: lm.weight(name).detach().float().clone() for name in names}  # (out, in)
        self._weight = {name: start.clone().requires_grad_() for name, start in self._start.items()}
        self._bound: dict[str, float] = {}
        groups = []
        for name, start in self._start.items():
            rate, self._bound[name] = step_size.of(start)
            groups.append({"params": [self._weight[name]], "lr": rate})
        self._optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)

    @contextmanager
    def in_use(self):
        """While open, the model computes with the copies."""
        with ExitStack() as stack:
            for name, weight in self._weight.items():
                stack.enter_context(weight_replaced(self._lm.model.get_submodule(name), weight))
            yield

    def step(self, loss: Tensor) -> None:
        """One update against `loss`, then every weight goes back to within its bound around the start (L∞)."""
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            for name, weight in self._weight.items():
                start, bound = self._start[name], self._bound[name]
                if bound < float("inf"):
                    weight.copy_(weight.clamp(start - bound, start + bound))

    def deltas(self) -> dict[str, Delta]:
        """What changed, by matrix."""
        return {name: Dense((weight - self._start[name]).detach()) for name, weight in self._weight.items()}
