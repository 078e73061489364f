"""A change is kept as factors while they are smaller than the matrix, whoever makes it."""

from __future__ import annotations

import pytest
import torch

from reknow.files.schema import FormatError
from reknow.patching.deltas import Dense, LowRank, add_deltas, as_delta, delta_tensors, read_deltas, sum_deltas

OUT, IN = 12, 24  # a product is smaller below rank 8


@pytest.mark.parametrize(("rank", "kind"), [(1, LowRank), (7, LowRank), (8, Dense), (30, Dense)])
def test_one_criterion_decides_for_products_and_sums(rank, kind):
    left, right = torch.randn(rank, OUT), torch.randn(rank, IN)
    product = as_delta(left, right)
    assert isinstance(product, kind) and torch.allclose(product.dense(), (left.T @ right).double(), atol=1e-5)
    parts = [LowRank(left[i : i + 1].T, right[i : i + 1]) for i in range(rank)]
    total = sum_deltas(parts)
    assert isinstance(total, kind) and torch.allclose(total.dense(), product.dense(), atol=1e-5)
    assert total.norm() == pytest.approx(float(product.dense().norm()), rel=1e-5)


def test_a_sum_with_a_matrix_is_a_matrix():
    low, dense = LowRank(torch.randn(OUT, 1), torch.randn(1, IN)), Dense(torch.randn(OUT, IN))
    total = sum_deltas([low, dense])
    assert isinstance(total, Dense) and torch.allclose(total.dense(), low.dense() + dense.dense(), atol=1e-6)
    base = torch.randn(OUT, IN, dtype=torch.float64)
    assert torch.allclose(add_deltas(base, [low, dense, low]), base + 2 * low.dense() + dense.dense(), atol=1e-6)


def test_tensors_of_a_file_are_the_same_changes():
    deltas = {"a.b": LowRank(torch.randn(OUT, 2), torch.randn(2, IN)), "c": Dense(torch.randn(OUT, IN))}
    again = read_deltas(delta_tensors(deltas))
    assert {name: type(delta) for name, delta in again.items()} == {"a.b": LowRank, "c": Dense}
    assert all(torch.equal(again[name].dense(), delta.dense()) for name, delta in deltas.items())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop("delta.a.left"), "is missing"),
        (lambda t: t.pop("delta.a.right"), "is missing"),
        (lambda t: t.update({"delta.a.dense": torch.zeros(OUT, IN)}), "by a matrix and by factors"),
        (lambda t: t.update({"delta.a.left": torch.zeros(OUT, 3)}), "ranks 3 and 2"),
        (lambda t: t.update({"delta.a.right": torch.zeros(2)}), "dimensions"),
        (lambda t: t.update({"delta..left": torch.zeros(OUT, 2)}), "none of this name"),
        (lambda t: t.update({"other": torch.zeros(2)}), "none of this name"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, why):
    tensors = delta_tensors({"a": LowRank(torch.randn(OUT, 2), torch.randn(2, IN))})
    change(tensors)
    with pytest.raises(FormatError, match=why):
        read_deltas(tensors)
