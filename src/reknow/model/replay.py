"""Running only the blocks that matter.

Every decoder calls its blocks as `block(hidden, …)`. `BlockReplay` records the arguments of each call once and then
replays the blocks above a layer, and the columns from the subject's last token on, with no code for any family.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from reknow.model.beginnings import left_cache
from reknow.model.decoder import Decoder
from reknow.model.fast_modules import fast_modules
from reknow.model.head import apply_head, mlp_only_at
from reknow.model.hooks import (
    Stop,
    added_at,
    by_row,
    forwards_replaced,
    hidden_states,
    hooked,
    output_edited,
    recorded,
)
from reknow.model.packing import Packing
from reknow.model.tokens import Batch

__all__ = ["BlockReplay", "Call", "record_block_calls", "select_cache_rows"]


def _copy_cache(cache: Cache | None) -> Cache | None:
    """A cache that may grow without touching the original: layers are copied, their tensors shared."""
    if cache is None:
        return None
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def select_cache_rows(cache: Cache | None, layer: int, rows: Tensor) -> Cache | None:
    """A fresh cache whose layer `layer` holds the given rows, repeated at will; its other layers are unchanged."""
    copied = _copy_cache(cache)
    if copied is not None:
        _select_rows(copied.layers[layer], rows)
    return copied


def _select_rows(layer: Any, rows: Tensor) -> None:
    """Makes a layer of a cache, which may lie on another device, hold these rows."""
    layer.batch_select_indices(rows.to(layer.keys.device) if layer.is_initialized else rows)


_PADDED = 0.1
"""Share of padding from which a batch is run without it: to pack and unpack what attention needs costs less."""

Call = tuple[tuple, dict]
"""The arguments of one call of a block; the hidden states are the first."""


def record_block_calls(lm: Decoder, run: Callable[[], object], trailing: Sequence[tuple | None]) -> list[Call]:
    """What the model calls its blocks with during `run()`, found without running any of them.

    Args:
        trailing: per block, what its output holds behind the hidden states; None where it is no tuple.
    """
    calls: list[Call] = []

    def keep(*args, **kwargs):
        rest = trailing[len(calls)]
        calls.append((args, kwargs))
        if len(calls) == len(trailing):
            raise Stop
        return args[0] if rest is None else (args[0], *rest)

    with forwards_replaced({lm.model.get_submodule(name): keep for name in lm.parts.blocks}), suppress(Stop):
        run()
    return calls


def _tensors(value) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _of_rows(value, rows: Tensor, count: int):
    """The same nest with tensors that have an entry for each of the `count` rows cut to these rows; a vector has
    none."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.dim() > 1 and len(value) == count else value
    if isinstance(value, dict):
        return {key: _of_rows(each, rows, count) for key, each in value.items()}
    return type(value)(_of_rows(each, rows, count) for each in value) if isinstance(value, (tuple, list)) else value


class BlockReplay:
    """A batch run once, of which the blocks above `layer` can be replayed from column `column` on.

    An addition δ that enters at the output of layer `layer`'s value matrix in column `column` changes nothing
    to its left in any layer and nothing in the layers below, so neither is computed again. Where the addition
    reaches the block's output unchanged (`parts.residual_identity`) the block itself is not run either.

    Args:
        keep: what that one run gives is kept for `logits_at_first`, which a selection of rows does not have.

    Attributes:
        keys: input of the value matrix at `column` and behind it. (rows, columns, in)
        key: the same at `column`. (rows, in)
        value: its output before any addition, at `column`. (rows, hidden)
        attention: attention's output in that layer, there. (rows, hidden)
        block: the layer's output, there. (rows, hidden)
    """

    def __init__(self, lm: Decoder, batch: Batch, layer: int, column: int, *, keep: bool = False):
        self.lm, self.batch, self.layer, self.column, self._keep = lm, batch, layer, column, keep
        self.name = lm.parts.value[layer]
        # A memory decides at the prompt's last token, and what it decides may change every column before.
        self._start = column if lm.parts.replayable and not lm.hooked else 0
        """First column that is run again."""
        self._calls: list[tuple[tuple, dict]] = []
        self._block_input: Tensor  # (rows, columns, hidden), where the blocks are replayed
        self._cache = left_cache(lm, batch, self._start) if self._start else None
        self._asked: tuple[Tensor, Tensor, tuple[Tensor, ...]] | None = None
        self._packed: tuple[Packing, list[Call]] | None = None
        self._record()

    def select(self, rows: Tensor) -> BlockReplay:
        """The replay of some of the rows; what lies left of `column` is not run again, and nothing where the blocks'
        arguments are told apart by row (`parts.row_selectable`). rows: (n,)"""
        selected, batch = copy.copy(self), self.batch
        selected.batch = batch.select(rows)
        selected._cache, selected._calls, selected._asked = _copy_cache(self._cache), [], None
        selected._keep, selected._last, selected._packed = False, None, None
        for layer in [] if selected._cache is None else selected._cache.layers:
            _select_rows(layer, rows)
        if self.lm.parts.row_selectable and not self.lm.hooked:
            selected._calls = _of_rows(self._calls, rows, len(batch.ids))
            for name in ("_block_input", "_block_output", "keys", "key", "value", "attention", "block"):
                states = getattr(self, name)
                setattr(selected, name, states[rows.to(states.device)])
        else:
            selected._record()
        return selected

    @property
    def attention_calls(self) -> int:
        """How often attention was called of what is run without padding."""
        return 0 if self._packed is None else self._packed[0].calls

    @property
    def row_selectable(self) -> bool:
        """Whether every tensor among the blocks' arguments has an entry per row, or is the same for all rows."""
        return all(each.dim() < 2 or len(each) in (1, len(self.batch.ids)) for each in _tensors(self._calls))

    def _run(self, columns: slice, cache: Cache | None, **options):
        batch = self.batch
        return self.lm.forward(
            batch.ids[:, columns],
            batch.mask[:, : columns.stop],
            batch.positions[:, columns],
            cache=cache,
            ends=batch.ends,
            **options,
        )

    @torch.no_grad()
    def _record(self) -> None:
        """One pass over the right-hand columns, keeping what every block from `layer` on was called with; what those
        above it would compute nobody reads, but of the last with `keep`."""
        rows, width = self.batch.ids.shape
        model, blocks = self.lm.model, self.lm.parts.blocks
        replayed = [model.get_submodule(name) for name in blocks[self.layer :] if self.lm.parts.replayable]
        behind: list[tuple | list] = []  # what a block's output holds behind the hidden states, if it is no tensor

        def keep(_module, args, kwargs):
            if not self._calls:
                self._block_input = args[0]
            self._calls.append((args[1:], kwargs))

        def keep_form(_module, _args, output):
            behind.extend([output[1:]] if isinstance(output, (tuple, list)) else [])

        def pass_on(*args, **kwargs):
            keep(None, args, kwargs)
            return (args[0], *behind[0]) if behind else args[0]

        every = self._keep or self.lm.hooked
        above = dict.fromkeys(() if every else replayed[1:], pass_on)
        hooks = [
            partial(block.register_forward_pre_hook, keep, with_kwargs=True)
            for block in replayed[: None if every else 1]
        ]
        hooks += [partial(block.register_forward_hook, keep_form) for block in replayed[:1]]
        outputs = [self.name, self.lm.parts.attention_out[self.layer], blocks[self.layer]]
        last = dict.fromkeys(blocks[-1:] if self._keep else ())
        with (
            hooked(*hooks),
            forwards_replaced(above),
            recorded(model, [self.name], dict.fromkeys(outputs) | last) as (seen_in, seen_out),
        ):
            self._run(slice(self._start, width), _copy_cache(self._cache), logits_to_keep=1)
        self._last = seen_out[blocks[-1]] if self._keep else None
        self._context = self.lm.running.context
        self._block_output = seen_out[outputs[2]]  # (rows, columns, hidden)
        states = (seen_in[self.name], *(seen_out[name] for name in outputs))
        right = [by_row(state, rows)[:, self.column - self._start :] for state in states]
        self.keys = right[0]
        self.key, self.value, self.attention, self.block = (state[:, 0] for state in right)

    def __call__(
        self,
        delta: Tensor,
        rows: Tensor,
        columns: Tensor,
        *,
        attention: Tensor | None = None,
        seen: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Logits at (rows[i], columns[i]) with `delta` added at the value matrix's output.

        Args:
            delta: (rows, hidden), added in `column`; or (rows, columns, hidden), from there on.
            rows: (n,) row of each wanted position.
            columns: (n,) its column in the batch; none lies left of `column`.
            attention: (rows, hidden), added at attention's output in the same layer and column; None: nothing.
            seen: layers above, each of which is given its block's output in `column`, (rows, hidden).

        Returns:
            (n, vocabulary).
        """
        delta = delta.to(self.value.dtype)
        if self.lm.parts.replayable and self.lm.parts.residual_identity and attention is None:
            added = added_at(delta, self.column - self._start)(self._block_output)
            packing, places = self._packing(), self._distinct(rows, columns)
            if packing is not None:
                number = packing.number[places]
                places = torch.zeros_like(number), number
            whole = seen is not None and self.lm.layers - 1 in seen
            with nullcontext() if whole else mlp_only_at(self.lm, places):
                return self._replay(added, 1, rows, columns, packing, seen)
        packing = self._packing() if delta.dim() == 2 else None
        edit_at = added_at if packing is None else packing.added_at
        with ExitStack() as stack:
            for name, addition in ((self.name, delta), (self.lm.parts.attention_out[self.layer], attention)):
                if addition is not None:
                    edit = edit_at(addition.to(self.value.dtype), self.column - self._start)
                    stack.enter_context(output_edited(self.lm.model.get_submodule(name), edit))
            if packing is not None:
                return self._replay(self._block_input, 0, rows, columns, packing, seen)
            return self.rerun(rows, columns, seen)

    def behind_block(self, delta: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The same with `delta` (rows, hidden) at the block's output, whatever stands before that."""
        if self.lm.parts.residual_identity:
            return self(delta, rows, columns)
        edit = added_at(delta.to(self.value.dtype), self.column - self._start)
        with output_edited(self.lm.model.get_submodule(self.lm.parts.blocks[self.layer]), edit):
            return self.rerun(rows, columns)

    def _packing(self) -> Packing | None:
        """What leaves padding out of the blocks, where there is enough of it and the model allows it; not on a GPU,
        to which more calls are worse than more tokens."""
        parts = self.lm.parts
        if not (parts.replayable and parts.packable and self.lm.device.type == "cpu") or self.lm.hooked:
            return None
        if self._packed is None:
            real = self.batch.mask[:, self._start :].bool()
            if real.sum() > (1 - _PADDED) * real.numel():
                return None
            packing = Packing(real)
            self._packed = packing, packing.arguments(self._calls)
        return self._packed[0]

    def _distinct(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        """The places in order and each once, among the columns that are run: found once for these very tensors, since
        a GPU has to be waited for."""
        if self._asked is None or self._asked[0] is not rows or self._asked[1] is not columns:
            wanted = torch.zeros(self._block_output.shape[:2], dtype=torch.bool, device=rows.device)
            wanted[rows, columns - self._start] = True  # a place may be asked for twice
            self._asked = rows, columns, wanted.nonzero(as_tuple=True)
        return self._asked[2]

    @torch.no_grad()
    def logits_at_first(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits at (rows[i], columns[i]) with the weights as they were at the one run; where blocks cannot be
        replayed, as they are now. (n, vocabulary)"""
        if not self.lm.parts.replayable:
            return self.rerun(rows, columns)
        assert self._last is not None, "it was asked to keep them"
        return self._logits(self._last, rows, columns - self._start)

    def rerun(self, rows: Tensor, columns: Tensor, seen: dict[int, Tensor] | None = None) -> Tensor:
        """Logits at (rows[i], columns[i]) with the weights of the blocks as they are now. (n, vocabulary)"""
        if self.lm.parts.replayable:
            return self._replay(self._block_input, 0, rows, columns, None, seen)
        names = {self.lm.parts.blocks[layer]: layer for layer in seen or {}}
        with recorded(self.lm.model, outputs=names) as (_, found):
            logits = self._run(slice(0, self.batch.ids.shape[1]), None).logits[rows, columns]
        if seen is not None:
            seen.update({names[name]: by_row(found[name], len(self.batch.ids))[:, self.column] for name in names})
        return logits

    def _replay(
        self,
        hidden: Tensor,
        skip: int,
        rows: Tensor,
        columns: Tensor,
        packing: Packing | None = None,
        seen: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Logits at the places after the blocks from `layer + skip` on. hidden: (rows, columns, hidden)"""
        cache, names = _copy_cache(self._cache), self.lm.parts.blocks[self.layer + skip :]
        calls, columns, used = self._calls, columns - self._start, nullcontext()
        if packing is not None:
            assert self._packed is not None, "it has the packing"
            cache, calls, used = packing.cache(cache), self._packed[1], packing.in_use(self.lm.model)
            hidden, rows, columns = packing.pack(hidden), torch.zeros_like(rows), packing.number[rows, columns]
        self.lm.running.context = self._context  # another text may have been read since
        with fast_modules(self.lm.model), used:
            for layer, (name, (args, kwargs)) in enumerate(zip(names, calls[skip:], strict=True), self.layer + skip):
                args = (cache if isinstance(a, Cache) else a for a in args)
                kwargs = {key: cache if isinstance(a, Cache) else a for key, a in kwargs.items()}
                hidden = hidden_states(self.lm.model.get_submodule(name)(hidden, *args, **kwargs))
                if seen is not None and layer in seen:
                    here = self.column - self._start
                    seen[layer] = hidden[:, here] if packing is None else hidden[0, packing.number[:, here]]
            return self._logits(hidden, rows, columns)

    def _logits(self, hidden: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Those of the last block's output at some places. (n, vocabulary)"""
        return apply_head(self.lm, hidden[rows.to(hidden.device), columns.to(hidden.device)])
