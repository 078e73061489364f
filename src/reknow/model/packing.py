"""Rows of unlike length without their padding, through blocks that are made for rectangles.

All that a block does but attention it does token by token, so its real tokens may come as one row, one behind the
other. Attention alone needs to know which belong together: where it is one of transformers' exchangeable functions,
ours spreads queries, keys and values over the rectangle again, and multiplies short rows itself. Whether that holds
for a model is tried when it is verified.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

__all__ = ["Packing"]

_NAME = "reknow_packed"
"""What our function is called among transformers' functions of attention."""
_SHORT = 64
"""Most queries of a row whose scores are written out; torch's own function needs no memory for them."""


class Packing:
    """Which tokens of a rectangle are real.

    Args:
        real: (rows, columns), boolean.

    Attributes:
        number: of each real token in the one row; of padding any. (rows, columns)
        calls: how often attention was called.
    """

    def __init__(self, real: Tensor):
        self._shape, flat = real.shape, real.flatten()
        self._places = flat.nonzero()[:, 0]
        self.number = (flat.cumsum(0) - 1).clamp(min=0).view(real.shape)
        self.calls = 0

    def pack(self, states: Tensor) -> Tensor:
        """(rows, columns, any) → (1, real tokens, any)"""
        return states.flatten(0, 1).index_select(0, self._places)[None]

    def arguments(self, value: Any) -> Any:
        """A nest of arguments in which tensors with an entry for each token, vectors or numbers, are packed."""
        if isinstance(value, Tensor):
            return self.pack(value) if value.dim() in (2, 3) and value.shape[:2] == self._shape else value
        if isinstance(value, dict):
            return {key: self.arguments(each) for key, each in value.items()}
        return type(value)(map(self.arguments, value)) if isinstance(value, (tuple, list)) else value

    def cache(self, cache: Cache | None) -> Cache | None:
        """The cache itself, which from now on is given packed keys and values, and gives those of the rectangle."""
        if cache is not None:
            own = cache.update

            def update(keys: Tensor, values: Tensor, *args, **kwargs):
                return own(self._spread(keys), self._spread(values), *args, **kwargs)

            cache.update = update  # type: ignore[method-assign]
        return cache

    def added_at(self, delta: Tensor, column: int):
        """A function that adds `delta`, (rows, features), to packed states in one column, real in every row."""

        def add(states: Tensor) -> Tensor:
            return states.index_add(-2, self.number[:, column], delta.view(*states.shape[:-2], *delta.shape))

        return add

    @contextmanager
    def in_use(self, model: PreTrainedModel) -> Iterator[None]:
        """While open, the model's blocks take packed states."""
        config = model.config.get_text_config(decoder=True)
        own, AttentionInterface._global_mapping[_NAME] = config._attn_implementation, _attention
        token = _CURRENT.set(self)
        config._attn_implementation = _NAME
        try:
            yield
        finally:
            config._attn_implementation = own
            _CURRENT.reset(token)

    def _spread(self, states: Tensor) -> Tensor:
        """(1, heads, real tokens, any) → (rows, heads, columns, any), 0 on padding"""
        rows, columns = self._shape
        flat = states[0].transpose(0, 1)  # (real tokens, heads, any)
        wide = states.new_zeros(rows * columns, *flat.shape[1:]).index_copy(0, self._places, flat)
        return wide.view(rows, columns, *flat.shape[1:]).transpose(1, 2)

    def attend(self, module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options):
        """What the attention of a block calls: transformers' own on the rectangle."""
        self.calls += 1
        if len(key) != self._shape[0]:  # there is no cache, which spreads them
            key, value = self._spread(key), self._spread(value)
        query, scale = self._spread(query), options.get("scaling")
        few = query.shape[2] <= _SHORT and not options.get("dropout")
        if few and mask is not None and mask.shape[1] == 1 and scale is not None:
            found, weights = _attention_of_short_rows(query, key, value, mask, scale), None
        else:
            found, weights = sdpa_attention_forward(module, query, key, value, mask, **options)
        return self.pack(found), weights


def _attention_of_short_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V, (rows, queries, heads, any): heads that share keys in one product each, which
    for few queries takes less than half as long there and back as torch's own.

    Args:
        query: (rows, heads, queries, any).
        key, value: (rows, heads that share them, keys, any).
        mask: (rows or 1, 1, queries, keys), boolean or added.
    """
    rows, heads, queries, _ = query.shape
    shared, keys = key.shape[1:3]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    wide = (query * scale).reshape(rows * shared, -1, query.shape[3])  # (rows · shared, heads of one · queries, any)
    scores = torch.bmm(wide, key.reshape(rows * shared, keys, -1).transpose(1, 2))
    scores = scores.view(rows, shared, -1, queries, keys) + mask[:, :, None, :, -keys:]
    found = torch.bmm(scores.view(*wide.shape[:2], keys).softmax(-1), value.reshape(rows * shared, keys, -1))
    return found.view(rows, heads, queries, -1).transpose(1, 2)


_CURRENT: ContextVar[Packing] = ContextVar("packing")


def _attention(module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options):
    return _CURRENT.get().attend(module, query, key, value, mask, **options)
