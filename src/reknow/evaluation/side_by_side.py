"""Texts of models that differ in a few matrices, written together.

A token for one text takes as long as reading all weights, and tokens for thirty take hardly longer. Models that
edits have made of one base differ in a matrix or a few: W x + ΔW x, with another ΔW for the rows of each. So their
texts are written in one batch, each as it would be by itself: from random numbers of its own, alike up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from reknow.edits import Case
from reknow.errors import ModelError
from reknow.evaluation.probing import SAMPLED_TOP_K, cut_texts, text_rooms
from reknow.lm import LM
from reknow.model.fast_modules import product
from reknow.model.generation import continue_texts, text_batches
from reknow.model.hooks import by_row, hooked
from reknow.model.parts import is_matrix
from reknow.model.tokens import Text
from reknow.patching.deltas import Delta, LowRank
from reknow.patching.patches import Patch

__all__ = ["sample_side_by_side"]


@torch.no_grad()
def sample_side_by_side(lm: LM, cases: Sequence[Case], patches: Sequence[Patch], seed: int) -> list[list[str] | None]:
    """The texts of each case's probes for fluency with its own patch on top of the stack; None for a case whose texts
    cannot be written beside others, and where none can."""
    found: list[list[str] | None] = [None] * len(cases)
    if not all(_is_addition(lm, patch) for patch in (*lm.patches, *patches)):
        return found
    prompts = [[p.prompt for _, p in case.asked if p.kind == "fluency"] for case in cases]
    with lm.exclusive():
        for group in _groups(lm, prompts):
            texts = _write(lm, [prompts[i] for i in group], [patches[i].deltas for i in group], seed)
            for i, own in zip(group, texts or [], strict=False):
                found[i] = own
    return found


def _is_addition(lm: LM, patch: Patch) -> bool:
    """Whether the patch adds to what matrices in float32 give, on a CPU, where weights are what is waited for."""
    if patch.kind != "weights" or lm.dtype != torch.float32 or lm.device.type != "cpu" or lm.hooked:
        return False
    modules = [lm.model.get_submodule(name) for name in patch.deltas]
    return all(is_matrix(module) and module is not lm.model.get_output_embeddings() for module in modules)


def _groups(lm: LM, prompts: Sequence[Sequence[str]]) -> list[list[int]]:
    """Which cases are written together: as many as texts may be."""
    groups: list[list[int]] = []
    lengths: list[int] = []
    for i, own in enumerate(prompts):
        if not own:
            continue
        rows = lm.encode([Text(prompt) for prompt in own])
        _, most = text_rooms(lm, rows)
        mine = [len(row.ids) + most for row in rows]
        if groups and len(text_batches(lm, lengths + mine)) == 1:
            groups[-1].append(i)
            lengths += mine
        else:
            groups.append([i])
            lengths = mine
    return [group for group in groups if len(group) > 1]


def _write(
    lm: LM, prompts: Sequence[Sequence[str]], deltas: Sequence[Mapping[str, Delta]], seed: int
) -> list[list[str]] | None:
    """The texts behind each model's prompts; None where one has none to give, or there is no room for them."""
    encoded = [lm.encode([Text(prompt) for prompt in own]) for own in prompts]
    rooms = [text_rooms(lm, rows) for rows in encoded]
    # In the order of length, as texts are written by themselves.
    orders = [sorted(range(len(rows)), key=lambda i, rows=rows: len(rows[i].ids)) for rows in encoded]
    rows = [own[i] for own, order in zip(encoded, orders, strict=True) for i in order]
    most = max(count for _, count in rooms)
    if lm.max_tokens is not None and max(len(row.ids) for row in rows) + most - 1 > lm.max_tokens:
        return None
    starts = [sum(map(len, encoded[:i])) for i in range(len(encoded) + 1)]
    spans = [slice(*ends) for ends in pairwise(starts)]
    streams = [(span, count) for span, (_, count) in zip(spans, rooms, strict=True)]
    try:
        with _added_by_row(lm, deltas, spans):
            texts = continue_texts(lm, rows, most, top_k=SAMPLED_TOP_K, temperature=1.0, seed=seed, streams=streams)
    except ModelError:  # an edit has wrecked its model; by itself it is read as it is
        return None
    found = []
    for span, order, (room, _) in zip(spans, orders, rooms, strict=True):
        own = dict(zip(order, texts[span], strict=True))
        found.append(cut_texts(lm, [own[i] for i in range(len(own))], room))
    return found


@contextmanager
def _added_by_row(lm: LM, deltas: Sequence[Mapping[str, Delta]], spans: Sequence[slice]) -> Iterator[None]:
    """While open, each span of rows has matrices changed by its own ΔW."""
    rows = spans[-1].stop

    def hook(name: str):
        own = [delta.get(name) for delta in deltas]

        def add(_module, args, output: Tensor) -> Tensor:
            states = by_row(args[0], rows)  # (rows, columns, in)
            width = output.shape[-1]
            added = [_times(states[span], delta, width) for span, delta in zip(spans, own, strict=True)]
            return output + torch.cat(added).view(output.shape)

        return add

    names = dict.fromkeys(name for delta in deltas for name in delta)
    with hooked(*(partial(lm.model.get_submodule(name).register_forward_hook, hook(name)) for name in names)):
        yield


def _times(states: Tensor, delta: Delta | None, width: int) -> Tensor:
    """ΔW x of every token. (rows, columns, in) → (rows, columns, out)"""
    if delta is None:
        return states.new_zeros(*states.shape[:-1], width)
    if isinstance(delta, LowRank):
        return states @ delta.right.T @ delta.left.T
    return product(states, delta.matrix)
