"""Gradient descent on whole matrices: what fine-tuning and In-Context Editing share.

The matrices that are trained are copies which the model uses while `Matrices.in_use` is open, so the model itself is
never changed, and only they get gradients: autograd keeps nothing of the blocks below the lowest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reknow.checks.bounds import Rate, Weight, check_settings
from reknow.model.exact import finite_loss
from reknow.model.generation import decode, sample_tokens
from reknow.model.hooks import fused_gelu, weight_replaced
from reknow.model.replay import BlockReplay
from reknow.model.tokens import Row, make_batches
from reknow.patching.deltas import Delta, Dense

if TYPE_CHECKING:
    from reknow.lm import LM


@dataclass(frozen=True)
class Pace:
    """How fast and how far weights move."""

    learning_rate: Rate
    """Of Adam, in units of each matrix's root mean square: how far a weight moves in a step."""
    learning_rate_absolute: Rate | None = None
    """The same as a number, which then holds."""
    clamp: Weight | None = None
    """Largest change of a single weight, in the same unit; None: no bound."""
    clamp_absolute: Weight | None = None
    """The same as a number; where both are given the smaller bound holds."""

    def __post_init__(self):
        check_settings(self)

    def of(self, weight: Tensor) -> tuple[float, float]:
        """(learning rate, largest change) of this matrix, as numbers."""
        unit = float(weight.square().mean().sqrt())
        bounds = [self.clamp_absolute, None if self.clamp is None else self.clamp * unit]
        rate = self.learning_rate * unit if self.learning_rate_absolute is None else self.learning_rate_absolute
        return rate, min((b for b in bounds if b is not None), default=float("inf"))


class Matrices:
    """Copies of some matrices in float32, and the optimizer that moves them.

    Args:
        names: modules of `lm`.
    """

    def __init__(self, lm: LM, names: Sequence[str], pace: Pace):
        self._lm = lm
        self._start = {name: lm.weight(name).detach().float().clone() for name in names}  # (out, in)
        self._weight = {name: start.clone().requires_grad_() for name, start in self._start.items()}
        self._bound: dict[str, float] = {}
        groups = []
        for name, start in self._start.items():
            rate, self._bound[name] = pace.of(start)
            groups.append({"params": [self._weight[name]], "lr": rate})
        self._optimizer = torch.optim.Adam(groups, fused=True)

    @contextmanager
    def in_use(self):
        """While open, the model computes with the copies."""
        with ExitStack() as stack:
            stack.enter_context(fused_gelu(self._lm.model))
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


class SideBySide:
    """Changes of one matrix, a row of tokens each, that know nothing of each other and are trained in one batch.

    The matrix's input is the same whatever the change, so the change is an addition behind it: Δ k for every token.

    Args:
        weight: the matrix. (out, in)
        count: how many changes.
    """

    def __init__(self, weight: Tensor, count: int, pace: Pace):
        rate, self._bound = pace.of(weight.float())
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
        (slope,) = torch.autograd.grad(losses.sum(), self._added)  # (rows, columns, out)
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


class Scored:
    """Rows of tokens and the places in them whose predictions enter a loss.

    Args:
        pairs: per row, (index of the token that predicts, token predicted); what follows the last one is cut off.
        layer: the blocks below this one are run once and reused; None: every pass runs all, which is cheaper for
            rows that are read once or twice.

    Attributes:
        of_row: (n,) row of each scored place, in the order of `pairs`.
        targets: (n,) token predicted there.
        places: (rows, columns) bool, the scored places in the padded batch.
        real: (rows, columns) bool, its real tokens.

    Raises:
        InputError: a row is longer than the model's positions.
    """

    def __init__(self, lm: LM, rows: Sequence[Row], pairs: Sequence[Sequence[tuple[int, int]]], layer: int | None):
        ends = [max(column for column, _ in scored) + 1 for scored in pairs]
        rows = [Row(row.ids[:end], min(row.prompt_length, end)) for row, end in zip(rows, ends, strict=True)]
        self._lm, self._batch = lm, lm.pad(rows)
        starts = self._batch.starts.tolist()
        flat = [(i, starts[i] + c, token) for i, scored in enumerate(pairs) for c, token in scored]
        columns = [torch.tensor(values, device=lm.device) for values in zip(*flat, strict=True)]
        self.of_row, self._columns, self.targets = columns
        self.real = self._batch.mask.bool()
        self.places = torch.zeros_like(self.real)
        self.places[self.of_row, self._columns] = True
        self._replay = None if layer is None else BlockReplay(lm, self._batch, layer, 0)

    @property
    def keys(self) -> Tensor:
        """Input of the value matrix of `layer`, which no change of that matrix moves. (rows, columns, in)"""
        assert self._replay is not None, "a layer was given"
        return self._replay.keys

    def log_probs(self, added: Tensor | None = None) -> Tensor:
        """Log-probabilities of all tokens at the scored places, with the weights as they are now. (n, vocabulary)

        Args:
            added: (rows, columns, hidden), added at the output of that value matrix.
        """
        if self._replay is not None:
            places = self.of_row, self._columns
            logits = self._replay.rerun(*places) if added is None else self._replay(added, *places)
            return logits.float().log_softmax(-1)
        batch, first = self._batch, int(self._columns.min())
        keep = batch.ids.shape[1] - first
        inputs = (batch.ids, batch.mask, batch.positions, None)
        logits = self._lm.forward(*inputs, ends=batch.ends, logits_to_keep=keep).logits
        return logits[:, -keep:][self.of_row, self._columns - first].float().log_softmax(-1)

    def nll(self, added: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each predicted token, in nats; see `log_probs`. (n,)"""
        return -self.log_probs(added).gather(1, self.targets[:, None])[:, 0]


class Answers:
    """The answers of some edits behind their prompts, in batches whose blocks below `layer` are run once.

    Args:
        rows: encoded prompts with their answers.
    """

    def __init__(self, lm: LM, rows: Sequence[Row], layer: int):
        self._parts: list[tuple[Tensor, Scored, Tensor]] = []
        for part in make_batches([len(row.ids) for row in rows]):
            here = [rows[i] for i in part]
            scored = Scored(lm, here, [predicted(row, row.prompt_length) for row in here], layer)
            lengths = torch.tensor([len(row.target_ids) for row in here], device=lm.device)
            self._parts.append((torch.tensor(part, device=lm.device), scored, 1 / lengths[scored.of_row]))

    def nll(self, choose: Callable[[Tensor], object] = lambda part: None) -> Tensor:
        """Mean negative log-likelihood of each answer's tokens, in nats. (edits,)

        Args:
            choose: told the indices of the edits in the batch that is about to run.
        """
        found: list[Tensor] = []
        for part, scored, weights in self._parts:
            choose(part)
            found.append(weights.new_zeros(len(part)).index_add(0, scored.of_row, scored.nll() * weights))
        return torch.cat(found)[torch.cat([part for part, _, _ in self._parts]).argsort()]


def descend(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int, done: Callable[[Tensor], bool]
) -> list[float]:
    """Takes steps until the losses are `done`; gives their mean before every step.

    Args:
        loss: computes the losses of the edits as things stand. (edits,)
        done: told these losses.

    Raises:
        EditFailed: a loss is not finite.
    """
    losses: list[float] = []
    for _ in range(steps):
        found = loss()
        losses.append(finite_loss(found.mean()))
        if done(found.detach()):
            break
        optimizer.zero_grad()
        found.sum().backward()
        optimizer.step()
    return losses


def predicted(row: Row, first: int) -> list[tuple[int, int]]:
    """(index of the token that predicts, token predicted) of the row's tokens from the index `first` on."""
    return [(i - 1, row.ids[i]) for i in range(first, len(row.ids))]


def sample(
    lm: LM, rows: Sequence[Row], count: int, *, temperature: float, top_k: int | None, generator: torch.Generator
) -> list[tuple[int, ...]]:
    """`count` tokens drawn behind each row, never the end-of-text token.

    Args:
        top_k: draw among the likeliest only; None: among all.
        generator: on the CPU; all randomness comes from it.

    Raises:
        InputError: a row and its sample do not fit into the model's positions.
        EditFailed: the model's logits are not finite.
    """
    lm.check_length(rows, count - 1)
    end = lm.tokenizer.eos_token_id

    def choose(logits: Tensor) -> Tensor:
        finite_loss(logits.sum())
        if end is not None:
            logits[:, end] = -torch.inf
        return sample_tokens(logits, top_k or logits.shape[1], temperature, generator)

    return [tuple(tokens) for tokens in decode(lm, rows, count, choose).tolist()]
