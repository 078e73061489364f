"""What enters the lowest block that an editor changes: the blocks below it need not run each time a text is read.

In a training of many passes over the cases the states of their texts are kept: all blocks read a text once, and
afterwards the last few only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from reknow.lm import LM
from reknow.model.hooks import by_row, forwards_replaced, hooked, recorded
from reknow.model.tokens import EncodedText, Text, make_batches

__all__ = ["LowerStates"]

_Key = tuple[int, ...]
"""The tokens of a text without its last one, which nothing is read behind."""


class LowerStates:
    """States of texts where they enter a block, in place of the blocks below it.

    Args:
        layer: of that block.
        groups: texts whose states are kept. The texts of a group are read together when the first of them is needed,
            so that what is kept of a text does not depend on what was read before it.
        limit: bytes that the kept states may take; the last groups that would not fit are not kept.
    """

    def __init__(self, lm: LM, layer: int, groups: Sequence[Sequence[Text]] = (), *, limit: int = 2**31):
        self._lm, self._layer = lm, layer
        self._blocks = [lm.model.get_submodule(name) for name in lm.parts.blocks[:layer]]
        self._tuples = False
        """Whether the blocks give their states in a tuple."""
        self._groups: list[list[EncodedText]] = []
        self._group_of: dict[_Key, int] = {}
        self._states: dict[_Key, Tensor] = {}
        """(tokens, hidden) of what was read and is kept, or is needed now."""
        bytes_each = lm.model.config.get_text_config(decoder=True).hidden_size * lm.dtype.itemsize
        for group in groups if self.useful else ():
            rows = {_key(row): row for row in lm.encode(group)}
            new = [row for key, row in rows.items() if key not in self._group_of]
            limit -= bytes_each * sum(len(row.ids) for row in new)
            if limit < 0:
                break
            self._group_of |= {_key(row): len(self._groups) for row in new}
            self._groups.append(new)

    @property
    def useful(self) -> bool:
        """Whether there are blocks below, and the others can be run without them."""
        return self._layer > 0 and self._lm.parts.replayable

    @contextmanager
    def given(self, texts: Sequence[Text]) -> Iterator[None]:
        """While open, passes over these texts begin at the block."""
        if not self.useful:
            yield
            return
        rows = {_key(row): row for row in self._lm.encode(texts)}
        missing = [row for key, row in rows.items() if key not in self._states]
        wanted = dict.fromkeys(self._group_of[_key(row)] for row in missing if _key(row) in self._group_of)
        for group in wanted:
            self._read(self._groups[group])
        passing = [row for row in missing if _key(row) not in self._group_of]
        self._read(passing)
        try:
            with self._skipped():
                yield
        finally:
            for row in passing:
                del self._states[_key(row)]

    @torch.no_grad()
    def _read(self, rows: Sequence[EncodedText]) -> None:
        """Runs the blocks below for these texts."""
        rows = [EncodedText(row.ids[:-1], min(row.prompt_length, len(row.ids) - 1)) for row in rows]
        name = self._lm.parts.blocks[self._layer]
        parts = make_batches([len(row.ids) for row in rows], self._lm.device)
        for part in self._lm.progress.each("reading texts", parts, unit="batches"):
            batch = self._lm.pad([rows[i] for i in part])
            with recorded(self._lm.model, [name], stop=True) as (seen, _), self._kinds_noted():
                self._lm.forward(batch.ids, batch.mask, batch.positions, None)
            states = by_row(seen[name], len(part))
            for i, start, own in zip(part, batch.starts.tolist(), states, strict=True):
                self._states[rows[i].ids] = own[start:].clone()

    def _kinds_noted(self):
        def note(_module, _args, output):
            self._tuples = isinstance(output, tuple)

        return hooked(partial(self._blocks[0].register_forward_hook, note))

    @contextmanager
    def _skipped(self) -> Iterator[None]:
        """While open, the blocks below give the states and compute nothing."""
        entering: Tensor | None = None  # of the pass that runs

        def begin(_module, _args, options: dict) -> None:
            nonlocal entering
            if "attention_mask" in options:  # without one it is the head alone that runs
                entering = self._padded(options["input_ids"], options["attention_mask"])

        def hand_on(*_args, **_options):
            return (entering,) if self._tuples else entering

        begun = hooked(partial(self._lm.model.register_forward_pre_hook, begin, with_kwargs=True))
        with begun, forwards_replaced(dict.fromkeys(self._blocks, hand_on)):
            yield

    def _padded(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The states of a batch of rows, 0 on padding. (rows, columns, hidden)"""
        keys = [tuple(row[real].tolist()) for row, real in zip(ids, mask.bool(), strict=True)]
        first = self._states[keys[0]]
        states = first.new_zeros(*ids.shape, first.shape[-1])
        states[mask.bool().to(states.device)] = torch.cat([self._states[key] for key in keys])
        return states


def _key(row: EncodedText) -> _Key:
    return row.ids[:-1]
