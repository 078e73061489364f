"""Two things measured on the same cases: is the difference more than chance? No package for statistics is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from reknow.evaluation.intervals import resample

_ENUMERATED = 14
"""Up to so many unequal cases all 2ⁿ signs are gone through; above, `_DRAWN` of them."""
_DRAWN = 5000
_MANY = 200
"""From so many unequal cases on the test's own limit, the normal distribution, is taken."""
_CHANCE = 0.05
"""Differences that chance makes more often than this are none."""


class Difference(NamedTuple):
    """The mean of one minus the other, case by case."""

    mean: float
    low: float
    """Bounds of the 95 % interval: the percentile bootstrap over cases."""
    high: float
    p: float
    """How often a difference at least so large comes about if which of both had which value were a coin's toss."""
    cases: int
    """Those that both have."""


def paired(mine: Mapping[str, float], theirs: Mapping[str, float]) -> Difference | None:
    """Mine minus theirs over the cases of both; None where they share none."""
    found = _differences(mine, theirs)
    return Difference(float(found.mean()), *_interval(found), sign_flip_p(found), len(found)) if len(found) else None


def tied(mine: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    """Whether none of both can be called the better one: the interval of the difference holds 0, or p is not below
    5 %, which is stricter where cases are few: an interval of six of them is too narrow."""
    found = _differences(mine, theirs)
    if not len(found):
        return True
    low, high = _interval(found)
    return low <= 0 <= high or sign_flip_p(found) >= _CHANCE


def _differences(mine: Mapping[str, float], theirs: Mapping[str, float]) -> np.ndarray:
    return np.array([value - theirs[case] for case, value in mine.items() if case in theirs])  # (cases,)


def _interval(differences: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resample(differences)[1:], (2.5, 97.5))
    return float(low), float(high)


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p of a mean of 0: the permutation test by signs (Fisher 1935). (cases,)

    Where all differences that are not 0 have one size, as of yes and no, it is the exact sign test (McNemar's).
    """
    unequal = differences[np.abs(differences) > 1e-12]
    count, total = len(unequal), abs(float(unequal.sum()))
    if not count:
        return 1.0
    if np.ptp(np.abs(unequal)) < 1e-12:
        fewer = min(int((unequal > 0).sum()), int((unequal < 0).sum()))
        return min(1.0, 2 * sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count)
    if count <= _ENUMERATED:
        signs = 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1) - 1  # (2ⁿ, n)
        return float((np.abs(signs @ unequal) >= total - 1e-9).mean())
    if count >= _MANY:
        return math.erfc(total / math.sqrt(2 * float((unequal**2).sum())))
    signs = 2.0 * np.random.default_rng(0).integers(0, 2, (_DRAWN, count), dtype=np.int8) - 1
    extreme = int((np.abs(signs @ unequal) >= total - 1e-9).sum())
    return (1 + extreme) / (1 + _DRAWN)
