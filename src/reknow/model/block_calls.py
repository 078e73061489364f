"""One block by itself: what it was called with on some texts, to call it again with other weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reknow.model.decoder import Decoder
from reknow.model.fast_modules import fast_modules
from reknow.model.hooks import hidden_states, hooked, recorded
from reknow.model.tokens import EncodedText, make_batches

__all__ = ["BlockCall", "BlockCalls"]


class BlockCall(NamedTuple):
    """A batch of the rows."""

    rows: list[int]
    """Their indices."""
    args: tuple
    kwargs: dict[str, Any]
    context: Any
    """What memories know of the pass."""
    output: Tensor  # (rows, columns, hidden)
    real: Tensor  # (rows, columns) bool, what is no padding


class BlockCalls:
    """What block `layer` is called with on these rows, and what it gives, with the weights as they are now.

    Every row begins in the first column of its batch.
    """

    def __init__(self, lm: Decoder, rows: Sequence[EncodedText], layer: int):
        name = lm.parts.blocks[layer]
        self._lm, self._block = lm, lm.model.get_submodule(name)
        self.calls: list[BlockCall] = []
        for part in make_batches([len(row.ids) for row in rows]):
            batch = lm.pad([rows[i] for i in part], anchors=[0] * len(part))
            given: list[tuple[tuple, dict]] = []

            def keep(_module, args, kwargs, given=given):
                given.append((args, kwargs))

            watch = partial(self._block.register_forward_pre_hook, keep, with_kwargs=True)
            with torch.no_grad(), hooked(watch), recorded(lm.model, outputs=[name], stop=True) as (_, seen):
                lm.forward(batch.ids, batch.mask, batch.positions, None, ends=batch.ends)
            real = batch.mask.bool().to(seen[name].device)
            self.calls.append(BlockCall(part, *given[0], lm.running.context, seen[name], real))

    def outputs(self) -> Iterator[tuple[BlockCall, Tensor]]:
        """Each batch, and what the block gives for it with its weights as they are now."""
        for call in self.calls:
            self._lm.running.context = call.context  # another text may have been read since
            with fast_modules(self._lm.model):
                yield call, hidden_states(self._block(*call.args, **call.kwargs))
