"""The gradient of a matrix as what it is made of: one input and one output gradient per token.

The gradient of a loss by a matrix W (out, in) is Σ δ_i u_iᵀ over the tokens: u its input, δ the loss' gradient at its
output. What learns to transform gradients (MEND, MALMEN, UltraEdit) works on these factors, which are small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from reknow.lm import LM
from reknow.model.exact import finite_loss
from reknow.model.hooks import by_row, hidden_states, hooked
from reknow.model.scored_tokens import ScoredTokens, predictions
from reknow.model.tokens import EncodedText, make_batches
from reknow.patching.deltas import Delta, as_delta

TokenFactors = Mapping[str, tuple[Tensor, Tensor]]
"""Matrix → two factors with a row for each token."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The gradient factors of one matrix for a batch of rows, on `lm.device`."""

    u: Tensor  # (rows, columns, in), float32
    delta: Tensor  # (rows, columns, out), float32
    keep: Tensor  # (rows, columns), bool
    """Where a token is real and its gradient is not zero."""

    def flat(self) -> tuple[Tensor, Tensor]:
        """(u, δ) of the kept tokens. (n, in), (n, out)"""
        return self.u[self.keep], self.delta[self.keep]

    def spread(self, flat: Tensor) -> Tensor:
        """Values of the kept tokens (n, features) at their places, zero elsewhere. (rows, columns, features)"""
        full = flat.new_zeros(*self.keep.shape, flat.shape[-1])
        full[self.keep] = flat
        return full


def mlp_matrices(lm: LM, layers: Sequence[int]) -> list[str]:
    """Names of the MLPs' matrices in these layers: those that read the stream, then the value matrix."""
    return [name for layer in layers for name in (*lm.parts.mlp_in[layer], lm.parts.value[layer])]


def gradient_factors(
    lm: LM, names: Sequence[str], rows: Sequence[EncodedText], *, answers_only: bool = False
) -> tuple[dict[str, Factors], float]:
    """The factors of Σ over the rows of −(1/T) Σ_t log P(answer's token t), by matrix; and that loss per row.

    A row's factors do not depend on the rows beside it. One pass forwards, and one backwards to the lowest of the
    matrices.

    Args:
        names: of the matrices.
        rows: texts with answers.
        answers_only: keep only the tokens that predict the answer.

    Raises:
        InputError: a row is longer than the model's positions.
        EditFailed: the loss is not finite.
    """
    pairs = [predictions(row, row.prompt_length) for row in rows]
    scored = ScoredTokens(lm, rows, pairs, None)
    inputs: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}

    def hook(name: str):
        def after(_module, args, output):
            inputs[name] = args[0].detach()
            # An addition of zero, whose gradient is the output's.
            shifts[name] = torch.zeros_like(hidden_states(output), requires_grad=True)
            return output + shifts[name]

        return after

    with _behind(lm, {name: hook(name) for name in names}), torch.enable_grad():
        nll = scored.nll()
        lengths = torch.tensor([len(one) for one in pairs], device=nll.device)
        loss = (nll / lengths[scored.of_row]).sum()
        value = finite_loss(loss)
        gradients = torch.autograd.grad(loss, [shifts[name] for name in names])
    wanted = scored.places if answers_only else scored.real
    factors = {}
    for name, gradient in zip(names, gradients, strict=True):
        # Where networks are that read those of all layers.
        states = (by_row(states, len(rows)).detach().to(lm.device) for states in (inputs[name], gradient))
        u, delta = (each.float() for each in states)
        factors[name] = Factors(u, delta, wanted & (u != 0).any(-1) & (delta != 0).any(-1))
    return factors, value / len(rows)


def flat_factors(
    lm: LM, names: Sequence[str], rows: Sequence[EncodedText], *, answers_only: bool = False
) -> tuple[TokenFactors, float]:
    """The kept factors of any number of rows, in batches: name → (n, in), (n, out); and the mean loss.

    Rows come in order of length. Arguments and errors as in `gradient_factors`.
    """
    pieces: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    total = 0.0
    for batch in lm.progress.each("reading gradients", make_batches([len(row.ids) for row in rows]), unit="batches"):
        factors, loss = gradient_factors(lm, names, [rows[i] for i in batch], answers_only=answers_only)
        total += loss * len(batch)
        for name in names:
            pieces[name].append(factors[name].flat())
    joined = {}
    for name in names:
        us, deltas = zip(*pieces[name], strict=True)
        joined[name] = (torch.cat(us), torch.cat(deltas))
    return joined, total / len(rows)


def token_delta(left: Tensor, right: Tensor) -> Delta:
    """leftᵀ right as a change, without the tokens in which `left` is zero. (n, out), (n, in) → (out, in)"""
    used = (left != 0).any(1)
    return as_delta(left[used], right[used])


def _behind(lm: LM, hooks: Mapping[str, Callable]):
    """While open, each of these modules' outputs goes through its hook."""
    return hooked(*(partial(lm.model.get_submodule(n).register_forward_hook, hook) for n, hook in hooks.items()))


def row_changes(lm: LM, changes: TokenFactors, numbers: Tensor):
    """While open, every row of a batch is computed with its own change of these matrices, differentiably.

    Args:
        changes: name → (left, right), each change being leftᵀ right: (changes, n, out), (changes, n, in).
        numbers: which change each row has. (rows,)
    """

    def hook(left: Tensor, right: Tensor):
        def after(_module, args, output):
            states = by_row(args[0], len(right)).to(right.dtype)  # (rows, columns, in)
            change = (states @ right.to(states.device).transpose(1, 2)) @ left.to(states.device)
            return output + change.reshape(output.shape).to(output.dtype)

        return after

    return _behind(lm, {name: hook(left[numbers], right[numbers]) for name, (left, right) in changes.items()})


@torch.no_grad()
def repeated_deltas(lm: LM, rows: Sequence[EncodedText], changes: TokenFactors, most: int) -> dict[str, Delta]:
    """Changes, added again until the model's likeliest tokens are those of all answers, at most so many times.

    Args:
        rows: texts with answers.
        changes: name → (left, right), the change of that matrix being leftᵀ right: (n, out), (n, in).
    """
    times = 1 if most == 1 else _repeats(lm, rows, changes, most)
    return {name: token_delta(times * left, right) for name, (left, right) in changes.items()}


def _repeats(lm: LM, rows: Sequence[EncodedText], changes: TokenFactors, most: int) -> int:
    scored = ScoredTokens(lm, rows, [predictions(row, row.prompt_length) for row in rows], None)
    alike = torch.zeros(len(rows), dtype=torch.long, device=lm.device)
    for times in range(1, most):
        added = {name: (times * left[None], right[None]) for name, (left, right) in changes.items()}
        with row_changes(lm, added, alike):
            if bool((scored.log_probs().argmax(1) == scored.targets).all()):
                return times
    return most


def delta_added(lm: LM, deltas: Mapping[str, Tensor]):
    """While open, these matrices are computed with ΔW (out, in) added, differentiably."""

    def hook(delta: Tensor):
        def after(_module, args, output):
            return output + (args[0].to(delta.dtype) @ delta.to(output.device).T).to(output.dtype)

        return after

    return _behind(lm, {name: hook(delta) for name, delta in deltas.items()})
