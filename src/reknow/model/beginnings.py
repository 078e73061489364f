"""Beginnings that rows of tokens share, such as the texts before an edit's prompt: run once, not in every row.

Keys and values of a token depend on what stands before it and on its position, but not on the column in which padding
puts it. So those of a beginning are copied into every row that begins so, which is run from there on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from reknow.model.decoder import Decoder
from reknow.model.hooks import by_row, recorded
from reknow.model.tokens import Batch, EncodedText, make_batches

__all__ = ["Beginnings", "left_cache", "read_inputs", "rows_together"]

_WORTH = 0.25
"""Share of all tokens that must be spared, for a pass more."""
_FREE_TOKENS = 48
"""Tokens that cost as much as a pass by itself, see `editing.value_batch`."""


class Beginnings:
    """What rows begin with that others begin with too: per row the beginning that spares most tokens in all.

    Attributes:
        texts: those beginnings, each once.
        missing: how many tokens of each row lie behind it.
        worth: whether they spare enough.
    """

    def __init__(self, rows: Sequence[Sequence[int]]):
        children: dict[
            tuple[int, int], int
        ] = {}  # (number of a beginning, token behind it) → number of the longer one
        paths = []
        for row in rows:
            paths.append([0])
            for token in row:
                paths[-1].append(children.setdefault((paths[-1][-1], token), len(children) + 1))
        count = Counter(number for path in paths for number in path)
        lengths = [max(range(len(path)), key=lambda n: n - n / count[path[n]]) for path in paths]
        numbers = {path[n]: tuple(row[:n]) for row, path, n in zip(rows, paths, lengths, strict=True)}
        place = {number: i for i, number in enumerate(numbers)}
        self.texts, self._which = [*numbers.values()], [place[p[n]] for p, n in zip(paths, lengths, strict=True)]
        self.missing = [len(row) - n for row, n in zip(rows, lengths, strict=True)]
        spared = sum(lengths) - sum(map(len, self.texts))
        self.worth = spared >= _WORTH * max(sum(map(len, rows)), 1)

    def run(self, lm: Decoder) -> None:
        """Runs the beginnings, as far as the model goes."""
        self._cache = cache = DynamicCache(config=lm.model.config)
        self._batch = lm.pad([EncodedText(ids or (0,), 1) for ids in self.texts])
        batch = self._batch
        lm.forward(batch.ids, batch.mask, batch.positions, cache, logits_to_keep=1)

    def cache(self, lm: Decoder, rows: Sequence[int], batch: Batch, columns: int) -> DynamicCache:
        """The first columns of a batch of some of the rows; none of what is missing lies there."""
        which = torch.tensor([self._which[i] for i in rows], device=lm.device)
        shift = (self._batch.starts[which] - batch.starts)[:, None]
        places = (torch.arange(columns, device=lm.device) + shift).clamp(0, self._batch.ids.shape[1] - 1)

        def spread(states: Tensor) -> Tensor:
            return states[which[:, None].to(states.device), :, places.to(states.device)].transpose(1, 2).contiguous()

        return _cache_of(lm, [(spread(keys), spread(values)) for keys, values in _filled(self._cache)])


def _keeps(lm: Decoder, columns: int) -> bool:
    """Whether a cache of the model holds so many columns in all layers, not those of a window alone."""
    layers = DynamicCache(config=lm.model.config).layers
    return all(type(each) is DynamicLayer or getattr(each, "sliding_window", 0) > columns for each in layers)


def can_begin(lm: Decoder) -> bool:
    """Whether the first columns of a text leave keys and values alone: other states, as linear attention has, are
    changed in place by what follows."""
    layers = DynamicCache(config=lm.model.config).layers
    return all(type(each) in (DynamicLayer, DynamicSlidingWindowLayer) for each in layers)


def _filled(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the layers that were run."""
    return [(layer.keys, layer.values) for layer in cache.layers if layer.is_initialized]  # type: ignore[misc]


def _cache_of(lm: Decoder, layers: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache(config=lm.model.config)
    for i, (keys, values) in enumerate(layers):
        cache.update(keys, values, i)
    return cache


@torch.no_grad()
def left_cache(lm: Decoder, batch: Batch, columns: int) -> DynamicCache:
    """Keys and values of the batch's first columns, in all layers."""
    cache = DynamicCache(config=lm.model.config)
    starts, ids = batch.starts.tolist(), batch.ids.tolist()
    begun = Beginnings([row[start:columns] for row, start in zip(ids, starts, strict=True)])
    if begun.worth and not lm.hooked and _keeps(lm, columns):
        begun.run(lm)
        return _join(lm, [*_left_parts(lm, begun, batch, columns)])
    lm.forward(
        batch.ids[:, :columns],
        batch.mask[:, :columns],
        batch.positions[:, :columns],
        cache,
        ends=batch.ends,
        logits_to_keep=1,
    )
    return cache


def rows_together(missing: Sequence[int]) -> list[list[int]]:
    """Rows that miss about as many tokens, the least first: what is padded costs less than another pass."""
    parts: list[list[int]] = []
    for i in sorted(range(len(missing)), key=lambda i: missing[i]):
        padded = sum(missing[i] - missing[other] for other in parts[-1]) if parts else _FREE_TOKENS
        if padded < _FREE_TOKENS:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def _left_parts(
    lm: Decoder, begun: Beginnings, batch: Batch, columns: int
) -> Iterator[tuple[list[int], DynamicCache]]:
    """The rows of each part, and their cache."""
    for rows in rows_together(begun.missing):
        some, first = batch.select(torch.tensor(rows, device=lm.device)), columns - begun.missing[rows[-1]]
        cache = begun.cache(lm, rows, some, first)
        if first < columns:
            here = slice(first, columns)
            lm.forward(some.ids[:, here], some.mask[:, :columns], some.positions[:, here], cache, logits_to_keep=1)
        yield rows, cache


def _join(lm: Decoder, parts: Sequence[tuple[list[int], DynamicCache]]) -> DynamicCache:
    order = torch.tensor([i for rows, _ in parts for i in rows], device=lm.device).argsort()
    layers = zip(*(_filled(cache) for _, cache in parts), strict=True)

    def join(states: Sequence[Tensor]) -> Tensor:
        return torch.cat([*states])[order.to(states[0].device)]

    return _cache_of(lm, [(join([k for k, _ in each]), join([v for _, v in each])) for each in layers])


@torch.no_grad()
def read_inputs(lm: Decoder, rows: Sequence[EncodedText], columns: Sequence[int], name: str) -> Tensor:
    """Input of a module at one token of every row, as `Decoder.read` gives it. (rows, features)"""
    begun = Beginnings([row.ids[:column] for row, column in zip(rows, columns, strict=True)])
    if begun.worth and lm.parts.replayable and not lm.hooked and _keeps(lm, max(columns)):
        with recorded(lm.model, [name], stop=True):
            begun.run(lm)
        return _read_behind(lm, begun, rows, columns, name)
    return lm.read(rows, columns, inputs=[name]).inputs[name]


def _read_behind(
    lm: Decoder, begun: Beginnings, rows: Sequence[EncodedText], columns: Sequence[int], name: str
) -> Tensor:
    found, order = [], []
    for part in make_batches([missing + 1 for missing in begun.missing], lm.device):
        anchors = [columns[i] for i in part]
        batch, last = lm.pad([rows[i] for i in part], anchors), max(anchors)
        first = last - max(begun.missing[i] for i in part)
        cache, here = begun.cache(lm, part, batch, first), slice(first, last + 1)
        with recorded(lm.model, [name], stop=True) as (seen, _):
            lm.forward(batch.ids[:, here], batch.mask[:, : last + 1], batch.positions[:, here], cache)
        found.append(by_row(seen[name], len(part))[:, -1].clone())
        order += part
    return torch.cat(found)[torch.tensor(order, device=found[0].device).argsort()]
