"""UnKE: Everything is Editable: Extend Knowledge Editing to Unstructured Data in Large Language Models. Deng, Wei,
Pang, Ding, Shen, Cheng 2024, arXiv 2405.15349; and AnyEdit: Edit Any Knowledge Encoded in Language Models. Jiang,
Fang, Zhang, Wan, Ma, Wang, He, Chua 2025, arXiv 2502.05628.

An answer may be a text. Gradient descent finds the state z that the question's last token should have behind one
block so that the answer follows (`reknow.editing.chunks`). Then all matrices of that block, attention's too, are
trained to put out z there, and what they did at all other tokens, of the question q and of other texts X:

    min over W of  mean (block_W(q) − block(q) with z at its end)² + mean (block_W(X) − block(X))²

A single state can only make a model say so much. AnyEdit cuts the answer into chunks and finds a state for the token
before each, one after the other, each with those before it in place; the block is trained on question and answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reknow.checks.bounds import Name, NonNegative, Number, Rate, Seed
from reknow.contract import Method, check_edits, make_patch
from reknow.datasets.text import text_source
from reknow.editing.chunks import ChunkedText, ChunkSearch, cut_answers, find_states, states_now
from reknow.editing.contexts import text_contexts
from reknow.editing.descent import StepSize, TrainableMatrices, descend
from reknow.editing.layers import resolve_layers
from reknow.editing.papers_layers import depth_layer
from reknow.edits import Edit
from reknow.errors import ModelError
from reknow.lm import LM
from reknow.model.block_calls import BlockCall, BlockCalls
from reknow.model.parts import matrices_of
from reknow.model.tokens import EncodedText, Text
from reknow.patching.deltas import Delta
from reknow.patching.patches import Patch
from reknow.patching.record import Footprint

_DEPTH = 7 / 31


@dataclass(frozen=True, kw_only=True)
class UnKE(ChunkSearch, Method):
    """Trains one block so that a text follows a question."""

    layers: tuple[int, ...] | None = None
    """Blocks that are trained, each on an equal part of what is missing; None: the one at the papers' depth, 7
    of 32."""
    steps: Number = 50
    """Updates of a block."""
    learning_rate: Rate = 0.01
    """How far Adam moves a weight in a step, in root mean squares of its matrix."""
    decay: NonNegative = 0.01
    """AdamW's weight decay."""
    preserved_texts: Number = 20
    """How many other texts the block has to treat as before."""
    preserved_tokens: Number = 32
    """Tokens of each, from its beginning."""
    preserved_source: Name | None = None
    """A file, a folder or `hub:owner/name` to take them from; None: the bundled WikiText sample."""
    seed: Seed = 0
    """Seed of which texts are taken."""

    @property
    def name(self) -> str:
        return "unke" if self.chunk_tokens is None else "anyedit"

    def footprint(self, lm: LM) -> Footprint:
        return Footprint(resolve_layers(lm, [depth_layer(lm, _DEPTH)] if self.layers is None else self.layers))

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        if not lm.parts.replayable:
            others = "anyedit-memit or ft-uke" if lm.parts.residual_identity else "ft-uke"
            raise ModelError(
                f"expected a model whose blocks can be run by themselves, since {self.name} trains one; those of "
                f"{lm.name} cannot: take {others}"
            )
        edits = check_edits(self, edits, lm)
        layers, texts = self.footprint(lm).layers, cut_answers(lm, edits, self)
        z, losses = find_states(lm, texts, layers[-1], self)
        deltas: dict[str, Delta] = {}
        errors = []
        with lm.restored_afterwards():
            for i, layer in enumerate(layers):
                missing = z - states_now(lm, texts, lm.parts.blocks[layers[-1]])  # (chunks, hidden)
                change, course = self._train_block(lm, texts, layer, missing / (len(layers) - i))
                lm.apply(make_patch(self, lm, edits, change))
                deltas |= change
                errors.append(course)
        return make_patch(self, lm, edits, deltas, notes={"layers": layers, "losses": losses, "errors": errors})

    def _train_block(
        self, lm: LM, texts: Sequence[ChunkedText], layer: int, missing: Tensor
    ) -> tuple[dict[str, Delta], list[float]]:
        """(ΔW of the block's matrices that bring what is missing to the tokens before the chunks, its error before
        each update)."""
        # One chunk: the question alone is trained on.
        rows = [text.row if len(text.before) > 1 else _until(text.row, text.row.prompt_length) for text in texts]
        edited, kept = BlockCalls(lm, rows, layer), BlockCalls(lm, self._preserved(lm), layer)
        targets = _targets(edited.calls, texts, missing)
        names = matrices_of(lm.model, lm.parts.blocks[layer])
        step_size = StepSize(learning_rate=self.learning_rate, units=self.units)
        matrices = TrainableMatrices(lm, names, step_size, weight_decay=self.decay)

        def error() -> Tensor:
            wanted = _mean_square(edited, targets)
            return (wanted + _mean_square(kept, [call.output for call in kept.calls]))[None]

        with matrices.in_use(), torch.enable_grad():
            passes = descend([error], lambda loss, _: matrices.step(loss.sum()), self.steps, lambda loss: loss < 0)
        return matrices.deltas(), [course[0] for course in passes]

    def _preserved(self, lm: LM) -> list[EncodedText]:
        source = text_source(self.preserved_source)
        texts = text_contexts(lm, ((self.preserved_texts, self.preserved_tokens),), source, seed=self.seed)[1:]
        rows = lm.encode([Text(text.strip()) for text in texts])
        return [_until(row, lm.max_tokens or len(row.ids)) for row in rows]


def _until(row: EncodedText, end: int) -> EncodedText:
    return EncodedText(row.ids[:end], min(row.prompt_length, end))


def _targets(calls: Sequence[BlockCall], texts: Sequence[ChunkedText], missing: Tensor) -> list[Tensor]:
    """What the block gave, with what is missing added at the tokens before the chunks. missing: (chunks, hidden)"""
    first = [0]
    for text in texts:
        first.append(first[-1] + len(text.before))
    targets = []
    for call in calls:
        target = call.output.clone()
        for row, i in enumerate(call.rows):
            for number, place in enumerate(texts[i].before):
                target[row, place] += missing[first[i] + number].to(target)
        targets.append(target)
    return targets


def _mean_square(calls: BlockCalls, targets: Sequence[Tensor]) -> Tensor:
    """Mean over all numbers of all real tokens of the squared distance of what the block gives from the targets."""
    total = torch.tensor(0.0)
    for (call, output), target in zip(calls.outputs(), targets, strict=True):
        square = (output - target).float().square() * call.real[..., None]
        total = total.to(square.device) + square.sum()
    return total / sum(int(call.real.sum()) * call.output.shape[-1] for call in calls.calls)
