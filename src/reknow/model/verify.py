"""Verifies the parts that were found in a decoder, by a few small passes."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from reknow.model.beginnings import can_begin
from reknow.model.decoder import Decoder
from reknow.model.hooks import added_at, by_row, output_edited, recorded
from reknow.model.parts import Parts, device_of, embedding_matrix, refusal
from reknow.model.replay import BlockReplay
from reknow.model.scoring import check_logits
from reknow.model.tokens import Batch, EncodedText, Text, encode, pad

_log = logging.getLogger(__name__)

_FAILURES = TypeError, ValueError, RuntimeError, IndexError, AttributeError
"""What blocks raise that cannot be called by themselves, or not so."""


@torch.no_grad()
def verify(lm: Decoder) -> Parts:
    """The parts with what a few small passes tell of them.

    Checks that no token sees a later one and that rows padded on both sides give the logits of unpadded ones;
    measures whether additions to the value matrix's output reach the block's output as they are, whether its length
    is lost on the way, and whether replaying blocks gives the logits of a full pass.

    Raises:
        ModelError: the logits are no numbers, or one of the two checks fails.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(embedding_matrix(lm.model))
    lengths, anchors = (4, 6, 7), (2, 5, 3)
    rows = [EncodedText(tuple(torch.randint(vocabulary, (n,), generator=generator).tolist()), n) for n in lengths]
    unpadded = [_logits(lm, row) for row in rows]
    for logits in (*unpadded, _logits(lm, _sentence(lm))):
        check_logits(lm, logits)
    tolerance = 1e-4 if lm.dtype == torch.float32 else 5e-2
    if not _close(_logits(lm, EncodedText(rows[-1].ids[:4], 4))[-1], unpadded[-1][3], tolerance):
        raise refusal(lm.model, "its tokens see later ones")
    batch = pad(rows, rows[0].ids[0], anchors=anchors, device=lm.device)
    here = torch.arange(len(rows), device=lm.device)
    ends = batch.starts + torch.tensor(lengths, device=lm.device) - 1
    padded = lm.forward(batch.ids, batch.mask, batch.positions, None).logits[here, ends].float()
    if not _close(padded, torch.stack([logits[-1] for logits in unpadded]), tolerance):
        raise refusal(lm.model, "padding changes its logits, so that no batch could be trusted")
    return _measure(lm, batch, max(anchors), (here, ends), tolerance, generator)


def _measure(
    lm: Decoder, batch: Batch, column: int, scored: tuple[Tensor, Tensor], tolerance: float, generator
) -> Parts:
    """The parts, with the properties that an addition at a middle layer shows."""
    parts, layer = lm.parts, len(lm.parts.blocks) // 2
    block = parts.blocks[layer]
    with recorded(lm.model, outputs=[block]) as (_, before):
        lm.forward(batch.ids, batch.mask, batch.positions, None)
    if before[block].shape[:-1] != batch.ids.shape:
        raise refusal(lm.model, "its blocks hand on several states for a token, or none, where an edit wants one")
    spread = before[block][:, column].float().std()
    delta = torch.randn(len(batch.ids), parts.hidden_size, generator=generator).to(spread.device) * spread
    with (
        output_edited(lm.model.get_submodule(parts.value[layer]), added_at(delta.to(lm.dtype), column)),
        recorded(lm.model, outputs=[block]) as (_, after),
    ):
        wanted = lm.forward(batch.ids, batch.mask, batch.positions, None).logits[scored].float()
    moved = (after[block] - before[block])[:, column].float()
    identity = _close(moved, delta, 2 * tolerance)
    normed = not identity and _loses_length(lm, batch, layer, delta, column, tolerance)
    lm.parts = replace(parts, residual_identity=identity, value_normed=normed, row_selectable=True)
    same = row_selectable = packable = False
    try:
        if not can_begin(lm):
            raise ValueError("what its mixers keep of a text cannot be read twice")
        replay = BlockReplay(lm, batch, layer, column)
        same = _close(replay(delta, *scored).float(), wanted, tolerance)
        some = torch.arange(1, len(batch.ids), device=lm.device)
        logits = replay.select(some)(delta[some.to(delta.device)], some - 1, scored[1][some]).float()
        row_selectable = replay.row_selectable and _close(logits, wanted[some], tolerance)
        packable = same and _is_packable(lm, replay, delta, scored, wanted, tolerance)
    except _FAILURES as error:
        _log.info("replaying the blocks of %s failed: %s", type(lm.model).__name__, error)
    if not same:
        _log.warning("%s: blocks cannot be replayed; full passes are run instead, which is slower", lm.name)
    return replace(lm.parts, replayable=same, row_selectable=row_selectable, packable=packable)


def _is_packable(lm: Decoder, replay: BlockReplay, delta: Tensor, scored, wanted: Tensor, tolerance: float) -> bool:
    """Whether the replay gives the same without padding, and each of its blocks asks for attention once: what mixes
    tokens in another way would see those of other rows. Blocks on several devices are not tried."""
    places = {device_of(lm.model.get_submodule(name), lm.device) for name in lm.parts.blocks}
    if lm.model.config.get_text_config(decoder=True)._attn_implementation != "sdpa" or places != {lm.device}:
        return False
    lm.parts = replace(lm.parts, packable=True)
    try:
        same = _close(replay(delta, *scored).float(), wanted, tolerance)
    except _FAILURES as error:
        _log.info("the blocks of %s want rectangles: %s", type(lm.model).__name__, error)
        return False
    finally:
        lm.parts = replace(lm.parts, packable=False)
    blocks = len(lm.parts.blocks) - replay.layer - lm.parts.residual_identity
    return same and replay.attention_calls == blocks


def _loses_length(lm: Decoder, batch: Batch, layer: int, value: Tensor, column: int, tolerance: float) -> bool:
    """Whether the block gives the same for two values of one direction in that column. value: (rows, hidden)"""
    module, block, given = lm.model.get_submodule(lm.parts.value[layer]), lm.parts.blocks[layer], []
    for factor in (10, 20):  # long ones, so that what a norm adds to the variance counts for nothing

        def in_place(states: Tensor, wanted: Tensor = factor * value) -> Tensor:
            here = by_row(states, len(wanted))[:, column]
            return added_at(wanted.to(states.dtype) - here, column)(states)

        with output_edited(module, in_place), recorded(lm.model, outputs=[block]) as (_, seen):
            lm.forward(batch.ids, batch.mask, batch.positions, None)
        given.append(seen[block][:, column].float())
    shorter, longer = given
    return _close(shorter, longer, 2 * tolerance)


def _logits(lm: Decoder, row: EncodedText) -> Tensor:
    """Logits of one row by itself. (tokens, vocabulary), float32"""
    ids = torch.tensor([row.ids], device=lm.device)
    positions = torch.arange(ids.shape[1], device=lm.device)[None]
    return lm.forward(ids, torch.ones_like(ids), positions, None).logits[0].float()


def _sentence(lm: Decoder) -> EncodedText:
    """A real text with the tokenizer's own special tokens, whose states are the largest: what float16 cannot hold."""
    (row,) = encode(lm.tokenizer, [Text("The capital of France is Paris, and its river is the Seine.")])
    row = EncodedText(row.ids[: lm.max_tokens], 1)
    lm.pad([row])  # refuses tokens beyond the embedding
    return row


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether the root mean square difference is at most `tolerance` of b's spread."""
    return bool((a - b).square().mean().sqrt() <= tolerance * b.std().clamp(min=1e-6))
