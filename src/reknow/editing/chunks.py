"""Wanted states for answers that are texts: one for each chunk of an answer, at the token before it.

UnKE (Deng et al. 2024, arXiv 2405.15349) takes the answer as one chunk, whose state stands at the question's last
token. AnyEdit (Jiang et al. 2025, arXiv 2502.05628) cuts it into chunks of some tokens and finds their states one
after the other, each with those before it in place. With h_k what the block puts out at the token before chunk k,
z_k = h_k + δ_k, and δ_k minimises by Adam, within ‖δ‖ ≤ clamp · ‖h‖,

    L(δ_k) = − 1/T Σ_t log P(token_t of chunk k | question, text before it; δ_1 … δ_k) + weight_decay · ‖δ‖ / ‖h‖

With `units="absolute"` the last term is weight_decay · ‖δ‖ / ‖h‖², as in the authors' code.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from reknow.checks.bounds import NonNegative, Number, Rate, Units
from reknow.editing.descent import adam_update, descend
from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.hooks import added_at, output_edited
from reknow.model.replay import BlockReplay
from reknow.model.tokens import EncodedText, Text
from reknow.progress import progress

__all__ = ["ChunkSearch", "ChunkedText", "cut_answers", "find_states", "states_now"]


@dataclass(frozen=True, kw_only=True)
class ChunkSearch:
    """Settings of the search for wanted states."""

    chunk_tokens: Number | None = None
    """Tokens of the answer that one state has to make the model say; None: all of them."""
    end_token: bool = True
    """Whether the end token, if there is one, is learned behind every answer, so that the model stops there."""
    search_steps: Number = 40
    """Updates of a state at most; 24 in the authors' code."""
    search_learning_rate: Rate = 0.5
    """Adam's step of one coordinate of δ, in root mean squares of the block's output."""
    search_weight_decay: NonNegative = 0.01
    """Weight in the loss of δ's length, relative to what it is added to."""
    search_clamp: Rate = 4.0
    """Largest length of δ, relative to what it is added to."""
    stop_loss: NonNegative = 0.05
    """End a state's search when its loss is below; in the authors' code 0.005 or 0.01, for a whole answer never."""
    units: Units = "relative"
    """`relative`: learning rates are measured by the model's own states and weights; `absolute`: they are plain
    numbers, and δ's length is divided by the square of the state's, as in the authors' code."""


class ChunkedText(NamedTuple):
    """A question with its answer, and where the answer's chunks lie."""

    row: EncodedText
    before: tuple[int, ...]
    """Index of the token before each chunk."""
    ends: tuple[int, ...]
    """Index behind the last token of each chunk."""


def cut_answers(lm: LM, edits: Sequence[Edit], search: ChunkSearch) -> list[ChunkedText]:
    """The edits' questions and answers in chunks.

    Raises:
        TextRefused: one is longer than the model's positions.
    """
    rows, end = lm.encode([Text.asked(edit) for edit in edits]), lm.tokenizer.eos_token_id
    if search.end_token and end is not None:
        rows = [EncodedText((*row.ids, end), row.prompt_length) for row in rows]
    lm.check_length(rows)
    cut = []
    for row in rows:
        size = search.chunk_tokens or len(row.ids)
        starts = range(row.prompt_length, len(row.ids), size)
        ends = tuple(min(start + size, len(row.ids)) for start in starts)
        cut.append(ChunkedText(row, tuple(start - 1 for start in starts), ends))
    return cut


def states_now(lm: LM, texts: Sequence[ChunkedText], name: str) -> Tensor:
    """What the module of that name puts out at the token before every chunk. (chunks, features), float64"""
    rows = [EncodedText(text.row.ids[: place + 1], place + 1) for text in texts for place in text.before]
    places = [len(row.ids) - 1 for row in rows]
    return exact(lm.read(rows, places, outputs=[name]).outputs[name])


def find_states(
    lm: LM, texts: Sequence[ChunkedText], layer: int, search: ChunkSearch
) -> tuple[Tensor, list[list[float]]]:
    """(z of every chunk of every text behind the block `layer`, losses of each until its end); the model is left as
    it is. (chunks, hidden), float64

    Raises:
        EditFailed: a loss is not finite.
    """
    longest = max(end - before - 1 for text in texts for before, end in zip(text.before, text.ends, strict=True))
    if layer == lm.layers - 1 and longest > 1:
        warnings.warn(
            f"layer {layer} is the last, where a state counts for the next token alone, and chunks have up to "
            f"{longest}: take an earlier one, or leave it to the library",
            stacklevel=1,  # said once, whoever calls
        )
    deltas: list[Tensor] = []
    losses: list[list[float]] = []
    chunks = [(text, number) for text in texts for number in range(len(text.before))]
    for text, number in progress.each("finding states", chunks, unit="chunks", parts=1):
        delta, course = _search(lm, text, deltas[len(deltas) - number :], layer, search)
        deltas.append(delta)
        losses.append(course)
    now = states_now(lm, texts, lm.parts.blocks[layer])
    return now + exact(torch.stack(deltas)).to(now.device), losses


def _search(
    lm: LM, text: ChunkedText, earlier: Sequence[Tensor], layer: int, search: ChunkSearch
) -> tuple[Tensor, list[float]]:
    """δ of the next chunk, (hidden,), and its losses, with those of the `earlier` chunks in place."""
    reading = _Reading(lm, text, earlier, layer)
    size, absolute = reading.state.norm(), search.units == "absolute"
    unit = torch.ones_like(size) if absolute else size / len(reading.state) ** 0.5
    radius = search.search_clamp * size
    scaled = torch.zeros(1, len(reading.state), device=lm.device, requires_grad=True)
    step = adam_update(torch.optim.Adam([scaled], lr=search.search_learning_rate))

    def losses() -> Tensor:
        delta = unit * scaled
        length = delta.norm(dim=1) / size ** (1 + absolute)
        return reading.nll(delta) + search.search_weight_decay * length

    def update(loss: Tensor, running: Tensor) -> None:
        step(loss, running)
        with torch.no_grad():
            scaled.mul_((radius / (unit * scaled).norm().clamp(min=1e-12)).clamp(max=1))

    with torch.enable_grad():
        passes = descend([losses], update, search.search_steps, lambda loss: loss < search.stop_loss)
    return (unit * scaled).detach()[0], [loss for (loss,) in passes]


class _Reading:
    """How likely the next chunk is, with the additions of those before it in place.

    What stands left of the token before the chunk is run once, with these additions; its keys and values are kept.

    Attributes:
        state: the block's output at that token. (hidden,), float32
    """

    def __init__(self, lm: LM, text: ChunkedText, earlier: Sequence[Tensor], layer: int):
        self._place, end = text.before[len(earlier)], text.ends[len(earlier)]
        ids = text.row.ids[: end - 1]  # the last token predicts nothing that is scored
        batch = lm.pad([EncodedText(ids, min(text.row.prompt_length, len(ids)))])
        self._block, self._cut = lm.model.get_submodule(lm.parts.blocks[layer]), lm.parts.replayable and not lm.hooked
        self._targets = torch.tensor(text.row.ids[self._place + 1 : end], device=lm.device)
        self._columns = torch.arange(self._place, end - 1, device=lm.device)
        self._fixed = torch.zeros(1, self._place, lm.parts.hidden_size, device=lm.device)
        for place, delta in zip(text.before, earlier, strict=False):
            self._fixed[0, place] = delta
        calls = count()

        def left_of_it(output: Tensor) -> Tensor:  # it is run first, and the rest behind it
            return added_at(self._fixed.to(output.dtype), 0)(output) if next(calls) == 0 else output

        with output_edited(self._block, left_of_it) if earlier and self._cut else nullcontext():
            self._replay = BlockReplay(lm, batch, layer, self._place)
        self.state = self._replay.block[0].to(lm.device).float()

    def nll(self, delta: Tensor) -> Tensor:
        """Mean negative log-likelihood of the chunk's tokens with δ (1, hidden) at the token before it. (1,)"""
        rows = torch.zeros_like(self._columns)
        if self._cut:
            logits = self._replay.behind_block(delta, rows, self._columns)
        else:
            added = torch.cat([self._fixed, delta[None]], 1)
            with output_edited(self._block, lambda output: added_at(added.to(output.dtype), 0)(output)):
                logits = self._replay.rerun(rows, self._columns)
        return cross_entropy(logits.float(), self._targets)[None]
