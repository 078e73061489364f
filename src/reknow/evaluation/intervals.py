"""Means over cases with their 95 % intervals: the percentile bootstrap over cases (Efron 1979)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from reknow.evaluation.metrics import harmonic_mean

_RESAMPLES = 1000
_LOGARITHMIC = ("perplexity@sampled", "perplexity@side", "PPL_r@sampled")
"""Metrics that are averaged as logarithms."""


class Mean(NamedTuple):
    """A mean over cases."""

    mean: float
    low: float | None
    """Lower bound of its 95 % interval; None with a single case. It is a point where all cases agree."""
    high: float | None
    """Upper bound."""
    cases: int


def resample(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """The mean of the values that are not NaN, then that of each bootstrap sample. (cases,) → (1 + _RESAMPLES,)

    Values of as many cases are resampled alike, so that their differences can be taken.
    """
    there = ~np.isnan(values)
    draws = _draws(len(values), seed)[:, there]
    with np.errstate(invalid="ignore"):  # a sample without any of these cases
        return draws @ values[there] / draws.sum(1)


@lru_cache(maxsize=2)
def _draws(cases: int, seed: int) -> np.ndarray:
    """How often each case is in a sample; the first sample is the cases themselves. (1 + _RESAMPLES, cases)"""
    draws = np.random.default_rng(seed).multinomial(cases, [1 / cases] * cases, _RESAMPLES)
    return np.vstack([np.ones(cases), draws])


def with_interval(means: np.ndarray, cases: int) -> Mean:
    """What `resample` gave, or what was computed of it sample by sample, as a mean with its interval."""
    if cases < 2:
        return Mean(float(means[0]), None, None, cases)
    low, high = np.nanpercentile(means[1:], (2.5, 97.5))
    return Mean(float(means[0]), float(low), float(high), cases)


def average_cases(cases: Sequence[Mapping[str, float]]) -> dict[str, Mean]:
    """Metric → its mean over the cases that have it.

    S, where its parts are there, is the harmonic mean of the means of ES, PS and NS.
    """
    found: dict[str, tuple[np.ndarray, int]] = {}
    for key in dict.fromkeys(key for case in cases for key in case):
        values = np.array([case.get(key, np.nan) for case in cases])
        count = int((~np.isnan(values)).sum())
        found[key] = (np.exp(resample(np.log(values))) if key in _LOGARITHMIC else resample(values)), count
    parts = [found[key] for key in ("ES@contrast", "PS@contrast", "NS@contrast") if key in found]
    if len(parts) == 3:
        rows = np.stack([means for means, _ in parts], 1)  # (1 + resamples, 3)
        score = np.array([np.nan if np.isnan(row).any() else harmonic_mean(row) for row in rows])
        found["S@contrast"] = score, min(count for _, count in parts)
    return {key: with_interval(means, count) for key, (means, count) in found.items()}
