"""Differences on the same cases: their intervals and how easily chance makes them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reknow.evaluation.paired import paired, sign_flip_p, tied


def test_of_yes_and_no_it_is_the_exact_sign_test():
    """Nine of ten unequal pairs one way: 2 · (1 + 10) / 2¹⁰."""
    assert sign_flip_p(np.array([1] * 9 + [-1] + [0] * 30)) == pytest.approx(22 / 1024)
    assert sign_flip_p(np.zeros(5)) == 1.0 and sign_flip_p(np.array([1.0])) == 1.0


def test_few_pairs_are_gone_through_and_many_are_drawn():
    few = np.array([0.5, 0.25, 0.75, -0.1])
    signs = [[1 - 2 * (n >> i & 1) for i in range(4)] for n in range(16)]
    extreme = sum(abs(np.dot(s, few)) >= few.sum() - 1e-12 for s in signs)
    assert sign_flip_p(few) == extreme / 16
    many = np.random.default_rng(1).normal(0.3, 1, 60)
    z = many.sum() / math.sqrt((many**2).sum())  # the permutation's own normal limit
    assert sign_flip_p(many) == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.01)
    assert sign_flip_p(many) == sign_flip_p(many)
    more = np.random.default_rng(2).normal(0.1, 1, 250)
    assert sign_flip_p(more) == pytest.approx(math.erfc(more.sum() / math.sqrt(2 * (more**2).sum())))


def test_only_cases_of_both_count():
    mine, theirs = {"a": 1.0, "b": 0.5, "c": 1.0}, {"b": 0.0, "c": 1.0, "d": 0.0}
    found = paired(mine, theirs)
    assert found is not None and found.cases == 2 and found.mean == 0.25 and tied(mine, theirs)
    assert paired(mine, {"x": 1.0}) is None
    sure = paired(dict.fromkeys("abcdefgh", 1.0), dict.fromkeys("abcdefgh", 0.0))
    assert sure is not None and sure.p == 2 / 2**8
    assert not tied(dict.fromkeys("abcdefgh", 1.0), dict.fromkeys("abcdefgh", 0.0))
    five = [dict.fromkeys("abcde", value) for value in (1.0, 0.0)]
    assert tied(*five), "five tosses alike come about in 6 of 100 rows of five, however sure the interval looks"
    assert tied(mine, {})
