"""Where papers edit: the layers that they name for a model of this shape, and a depth for any other."""

from __future__ import annotations

from reknow.lm import LM
from reknow.published import published_layers

__all__ = ["band_around", "depth_layer", "papers_layers"]

_DEPTH = 0.17
"""The papers' layers as a share of the depth: 5 of 28 (GPT-J), 5 of 32 (Llama); GPT-2 XL's 17 of 48 is deeper."""
_NARROW = 1024
"""Hidden sizes below are smaller than those of any model that a paper on locating edited."""
_DEPTH_NARROW = 0.1
"""The share for such models. At 0.17 neighbours of the edited facts change more on SmolLM2-135M and Gemma 3 270M, and
on models of 4 and 6 layers layer 0 is far better than layer 1 (docs/log.md)."""


def depth_layer(lm: LM, depth: float | None = None) -> int:
    """The layer at that share of the depth; None: where the papers on locating edit, or in a narrow model below."""
    if depth is None:
        depth = _DEPTH_NARROW if lm.parts.hidden_size < _NARROW else _DEPTH
    return round(depth * (lm.layers - 1))


def papers_layers(lm: LM) -> list[int]:
    """The layer that a paper edited in models of this shape, if one did, and `depth_layer`."""
    return [*published_layers("rome", lm), depth_layer(lm)]


def band_around(lm: LM, layer: int, count: int | None = None) -> list[int]:
    """So many layers around this one; None: those of a paper that edited this layer among others in models of this
    shape, or a sixth of the model, five at most, as the papers train of 32 and 48."""
    papers = published_layers("memit", lm)
    if count is None and papers and papers[0] <= layer <= papers[-1]:
        return papers
    count = min(1 + 2 * min(2, lm.layers // 12) if count is None else count, lm.layers)
    first = min(max(0, layer - count // 2), lm.layers - count)
    return list(range(first, first + count))
