"""Two things measured on the same cases: is the difference more than chance? No package for statistics is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from reknow.evaluation.intervals import resample

_ENUMERATED = 14
"""Up to so many unequal cases all 2ⁿ signs are gone through; above, `_DRAWN` of them."""
_DRAWN = 20_000


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

    @property
    def tied(self) -> bool:
        """Whether the interval holds 0: none of both can be called the better one."""
        return self.low <= 0 <= self.high


def paired(mine: Mapping[str, float], theirs: Mapping[str, float]) -> Difference | None:
    """Mine minus theirs over the cases of both; None where they share none."""
    shared = [case for case in mine if case in theirs]
    if not shared:
        return None
    found = np.array([mine[case] - theirs[case] for case in shared])  # (cases,)
    low, high = np.percentile(resample(found)[1:], (2.5, 97.5))
    return Difference(float(found.mean()), float(low), float(high), sign_flip_p(found), len(found))


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
    random = np.random.default_rng(0)
    extreme = sum(
        int((np.abs(random.choice((-1, 1), (1000, count)) @ unequal) >= total - 1e-9).sum())
        for _ in range(_DRAWN // 1000)
    )
    return (1 + extreme) / (1 + _DRAWN)
