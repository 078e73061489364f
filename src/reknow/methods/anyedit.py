"""AnyEdit: Edit Any Knowledge Encoded in Language Models. Jiang, Fang, Zhang, Wan, Ma, Wang, He, Chua 2025, arXiv
2502.05628: MEMIT chunk by chunk. The same with UnKE in place of MEMIT stands in `unke`.

The answer is cut into chunks. The token before each gets a state z that makes the model say the chunk, found one
after the other (`reknow.editing.chunks`). Then, from the first layer to the last, what is missing at those tokens is
divided by the number of layers left, and the value matrix is changed by the least squares of MEMIT, which here also
spares the keys K_p of all other tokens of question and answer:

    R = (z − h) / (L − l + 1),   ΔW = R Kᵀ (λC + K_p K_pᵀ + K Kᵀ)⁻¹
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reknow.checks.bounds import Name, Natural, NonNegative, Number
from reknow.contract import Method, check_edits, make_patch
from reknow.editing.chunks import ChunkedText, ChunkSearch, cut_answers, find_states, states_now
from reknow.editing.factors import keep_statistics, whitening
from reknow.editing.layers import resolve_layers
from reknow.editing.papers_layers import band_around, depth_layer
from reknow.editing.solvers import least_squares
from reknow.edits import Edit
from reknow.errors import ModelError
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.hooks import by_row, recorded
from reknow.model.tokens import make_batches
from reknow.patching.deltas import Delta, as_delta
from reknow.patching.patches import Patch
from reknow.patching.record import Footprint

_DEPTH = 6 / 31


@dataclass(frozen=True, kw_only=True)
class AnyEdit(ChunkSearch, Method):
    """Writes a text chunk by chunk over a band of layers."""

    chunk_tokens: Number | None = 20
    layers: tuple[int, ...] | None = None
    """Layers whose value matrices are changed; None: a sixth of the model, five at most, around the papers' depth, 6
    of 32."""
    regularization: NonNegative = 0.1
    """λ in units of the keys' mean kᵀC⁻¹k: by itself a chunk gets 1 / (1 + this) of its change in a layer. Not read
    where `covariance_weight` is given."""
    covariance_weight: NonNegative | None = None
    """λ as a number, in place of `regularization`: 15,000 for Llama 3 and Qwen 2.5."""
    covariance_tokens: Natural | None = None
    """Tokens of general text for C; None: twenty for each input of the matrix, 100,000 at most."""
    covariance_text: Name | None = None
    """A file, a folder or `hub:owner/name` to read general text from; None: the bundled WikiText sample."""

    @property
    def name(self) -> str:
        return "anyedit-memit"

    def footprint(self, lm: LM) -> Footprint:
        band = band_around(lm, depth_layer(lm, _DEPTH)) if self.layers is None else self.layers
        return Footprint(resolve_layers(lm, band))

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        if not lm.parts.residual_identity:
            others = "anyedit or ft-uke" if lm.parts.replayable else "ft-uke"
            raise ModelError(
                f"expected a model in which what the value matrix adds reaches the block's output as it is, since "
                f"{self.name} writes states of that output; in {lm.name} a norm or a multiplier stands between: "
                f"take {others}"
            )
        edits = check_edits(self, edits, lm)
        layers, texts = self.footprint(lm).layers, cut_answers(lm, edits, self)
        z, losses = find_states(lm, texts, layers[-1], self)
        keep_statistics(lm, layers, tokens=self.covariance_tokens, text=self.covariance_text)
        deltas: dict[str, Delta] = {}
        with lm.restored_afterwards():
            for i, layer in lm.progress.each("writing", [*enumerate(layers)], unit="layers"):
                missing = z - states_now(lm, texts, lm.parts.blocks[layers[-1]])  # (chunks, hidden)
                keys, spared = _keys(lm, texts, layer)
                right = least_squares(
                    whitening(lm, layer, tokens=self.covariance_tokens, text=self.covariance_text),
                    keys,
                    regularization=self.regularization,
                    weight=self.covariance_weight,
                    past=spared,
                )  # (chunks, in)
                change = {lm.parts.value[layer]: as_delta(missing / (len(layers) - i), right)}
                lm.apply(make_patch(self, lm, edits, change))
                deltas |= change
        return make_patch(self, lm, edits, deltas, notes={"layers": layers, "losses": losses})


@torch.no_grad()
def _keys(lm: LM, texts: Sequence[ChunkedText], layer: int) -> tuple[Tensor, Tensor]:
    """Inputs of the layer's value matrix at the tokens before the chunks, and at all others. (tokens, in), float64"""
    name, rows = lm.parts.value[layer], [text.row for text in texts]
    found: dict[int, Tensor] = {}  # (tokens, in) by text
    for part in make_batches([len(row.ids) for row in rows], lm.device):
        batch = lm.pad([rows[i] for i in part], anchors=[0] * len(part))
        with recorded(lm.model, inputs=[name], stop=True) as (seen, _):
            lm.forward(batch.ids, batch.mask, batch.positions, None, ends=batch.ends)
        states = by_row(seen[name], len(part))
        found |= {i: exact(states[row, : len(rows[i].ids)]) for row, i in enumerate(part)}
    every = [[place in text.before for place in range(len(text.row.ids))] for text in texts]
    before = torch.tensor([place for own in every for place in own])
    states = torch.cat([found[i] for i in range(len(texts))])
    before = before.to(states.device)
    return states[before], states[~before]
