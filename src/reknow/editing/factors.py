"""What methods make of a layer's covariance C: its factors, a projector. Kept with the model while they are small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from reknow.editing import triangle
from reknow.editing.by_expert import ExpertWhitening
from reknow.editing.null_spaces import LeakyNullSpace
from reknow.editing.refined import Refined
from reknow.editing.solvers import Whitening, cholesky
from reknow.lm import LM
from reknow.model.parts import groups, shape

__all__ = ["Made", "from_covariance", "is_large", "keep_statistics", "whitening"]

Made = TypeVar("Made", Tensor, Refined, ExpertWhitening, LeakyNullSpace)

_CACHE_BYTES = 2**31
"""How much memory matrices made of covariances may take between two edits."""
_CACHE_SHARE_OF_GPU = 1 / 16
"""Which part of a GPU's memory they may take, where that is more: one of a 7B model is 1 GB."""


def keep_statistics(lm: LM, layers: Sequence[int], *, tokens: int | None, text: str | None) -> None:
    """Reads what C of these layers needs in one pass over the text, where it is not kept; each by itself would read
    the text again. Arguments and errors as in `covariance.statistics`."""
    from reknow.editing.covariance import keep_statistics

    keep_statistics(lm, layers, tokens=tokens, text=text)


def is_large(lm: LM, layer: int) -> bool:
    """Whether C of the layer is too large for float64 factors."""
    return shape(lm.model.get_submodule(lm.parts.value[layer]))[1] > triangle.LARGE


def whitening(lm: LM, layer: int, *, tokens: int | None, text: str | None) -> Whitening | Refined | ExpertWhitening:
    """B with B Bᵀ = C⁻¹, for C of the layer's keys, (in, in); of a large layer what solves with C."""
    if groups(lm.model.get_submodule(lm.parts.value[layer])) > 1:
        return from_covariance(lm, layer, ExpertWhitening, tokens=tokens, text=text)
    if is_large(lm, layer):
        return from_covariance(lm, layer, Refined.of, tokens=tokens, text=text)
    return Whitening(from_covariance(lm, layer, cholesky, tokens=tokens, text=text))


def from_covariance(
    lm: LM, layer: int, make: Callable[..., Made], *settings, tokens: int | None, text: str | None
) -> Made:
    """`make(C, *settings)`, such as a factor of C or a projector, for C of the layer's keys, (in, in).

    The last ones are kept with the model while they are small, since one edit follows the other: reading C and
    taking it apart costs as much as many steps of the search.
    """
    device = lm.weight(name := lm.parts.value[layer]).device
    budget = _CACHE_BYTES
    if device.type == "cuda":
        budget = max(budget, int(torch.cuda.get_device_properties(device).total_memory * _CACHE_SHARE_OF_GPU))

    def compute() -> Made:
        # Data sets and caches are loaded for it alone.
        from reknow.editing.covariance import covariance, covariance_triangle

        read = covariance_triangle if make in (Refined.of, ExpertWhitening) else covariance
        found = read(lm, layer, tokens=tokens, text=text)
        with lm.progress.stage(f"decomposing a covariance of {len(found):,} × {len(found):,}"):
            return make(found, *settings)

    key = ("covariance", make.__name__, name, str(device), tokens, text, *settings)
    return lm.cached(key, compute, budget=budget)
