"""Wanted states for answers that are texts: one for each chunk of an answer, at the token before it.

UnKE (Deng et al. 2024, arXiv 2405.15349) takes the answer as one chunk, whose state stands at the question's last
token. AnyEdit (Jiang et al. 2025, arXiv 2502.05628) cuts it into chunks of some tokens and finds their states one
after the other, each with those before it in place. With h_k what the block puts out at the token before chunk k,
z_k = h_k + δ_k, and δ_k minimises by Adam, within ‖δ‖ ≤ clamp · ‖h‖,

    L(δ_k) = − 1/T Σ_t log P(token_t of chunk k | question, text before it; δ_1 … δ_k) + weight_decay · ‖δ‖ / ‖h‖

With `units="absolute"` the last term is weight_decay · ‖δ‖ / ‖h‖², as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reknow.checks.bounds import Natural, NonNegative, Number, Rate, Units
from reknow.editing.descent import adam_update, descend
from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.hooks import added_at, output_edited, recorded
from reknow.model.scored_tokens import ScoredTokens, predictions
from reknow.model.tokens import EncodedText, Text, make_batches
from reknow.progress import progress

__all__ = ["ChunkSearch", "ChunkedText", "cut_answers", "find_states", "states_now"]


@dataclass(frozen=True, kw_only=True)
class ChunkSearch:
    """Settings of the search for wanted states."""

    chunk_tokens: Number | None = None
    """Tokens of the answer that one state has to make the model say; None: all of them."""
    end_token: bool = True
    """Whether the end token is learned behind every answer, so that the model stops there."""
    search_steps: Natural = 60
    """Updates of a state at most; 24 in the authors' code."""
    search_learning_rate: Rate = 0.1
    """Adam's step of one coordinate of δ, in root mean squares of the block's output."""
    search_weight_decay: NonNegative = 0.01
    """Weight in the loss of δ's length, relative to what it is added to."""
    search_clamp: NonNegative = 4.0
    """Largest length of δ, relative to what it is added to."""
    stop_loss: NonNegative = 0.02
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
    found: list[list[Tensor]] = [[] for _ in texts]
    losses: list[list[list[float]]] = [[] for _ in texts]
    longest = max(len(text.before) for text in texts)
    for number in progress.each("finding states", range(longest), unit="chunks", parts=1):
        having = [i for i, text in enumerate(texts) if number < len(text.before)]
        for part in make_batches([texts[i].ends[number] for i in having]):
            own = [having[i] for i in part]
            deltas, courses = _search(lm, [texts[i] for i in own], [found[i] for i in own], layer, search)
            for i, delta, course in zip(own, deltas, courses, strict=True):
                found[i].append(delta)
                losses[i].append(course)
    delta = exact(torch.stack([each for own in found for each in own]))
    return states_now(lm, texts, lm.parts.blocks[layer]) + delta, [each for own in losses for each in own]


def _search(
    lm: LM, texts: Sequence[ChunkedText], earlier: Sequence[Sequence[Tensor]], layer: int, search: ChunkSearch
) -> tuple[Tensor, list[list[float]]]:
    """δ of the next chunk of every text, (texts, hidden), and its losses, with those of `earlier` chunks in place."""
    number, name = len(earlier[0]), lm.parts.blocks[layer]
    rows = [EncodedText(text.row.ids[: text.ends[number]], text.row.prompt_length) for text in texts]
    pairs = [predictions(row, text.before[number] + 1) for row, text in zip(rows, texts, strict=True)]
    scored = ScoredTokens(lm, rows, pairs, layer)
    here = scored.places.int().argmax(1)  # (texts,) column of the token before the chunk
    every = torch.arange(len(texts), device=here.device)
    with torch.no_grad(), recorded(lm.model, outputs=[name]) as (_, seen):
        scored.row_nll()
    states = seen[name]  # (texts, columns, hidden)
    fixed = torch.zeros(states.shape, dtype=torch.float32, device=lm.device)
    for i, (text, deltas) in enumerate(zip(texts, earlier, strict=True)):
        for place, delta in zip(text.before, deltas, strict=False):
            fixed[i, int(here[i]) - text.before[number] + place] = delta
    size = states.to(lm.device)[every, here].float().norm(dim=1)  # (texts,)
    absolute, width = search.units == "absolute", states.shape[2]
    unit = (torch.ones_like(size) if absolute else size / width**0.5)[:, None]
    radius = search.search_clamp * size[:, None]
    scaled = torch.zeros(len(texts), width, device=lm.device, requires_grad=True)
    step = adam_update(torch.optim.Adam([scaled], lr=search.search_learning_rate), scaled)

    def losses() -> Tensor:
        delta = unit * scaled
        added = fixed.index_put((every, here), delta)
        with output_edited(lm.model.get_submodule(name), lambda output: added_at(added.to(output.dtype), 0)(output)):
            return scored.row_nll() + search.search_weight_decay * delta.norm(dim=1) / size ** (1 + absolute)

    def update(loss: Tensor, running: Tensor) -> None:
        step(loss, running)
        with torch.no_grad():
            scaled.mul_((radius / (unit * scaled).norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1))

    with torch.enable_grad():
        passes = descend([losses], update, search.search_steps, lambda loss: loss < search.stop_loss)
    courses = []
    for course in zip(*passes, strict=True):
        end = next((i for i, loss in enumerate(course, 1) if loss < search.stop_loss), len(course))
        courses.append(list(course[:end]))
    return (unit * scaled).detach(), courses or [[] for _ in texts]
