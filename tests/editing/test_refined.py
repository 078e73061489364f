"""Large covariances: their sums in less memory, and solutions as exact as those of the small."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from conftest import make_lm
from reknow import EMMET, MEMIT, ROME, AlphaEdit, Edit
from reknow.editing import triangle
from reknow.editing.covariance import covariance, statistics
from reknow.editing.refined import Refined
from reknow.editing.solvers import Whitening, cholesky, least_squares
from reknow.editing.triangle import PairedTriangle, Triangle
from reknow.errors import InputError
from reknow.evaluation import cost

EDIT = Edit("I know {}", subject="Danielle Darrieux", target_new="of")
OTHER = Edit("Who is {}", subject="Zoë Übel", target_new="in")
QUICK = dict(steps=5, context_groups=((2, 3),), covariance_tokens=200)
CPU = torch.device("cpu")


def keys(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Of unlike size in unlike directions, as a model's are: variances over eight orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator).double() @ spread(width)


@cache
def spread(width: int) -> torch.Tensor:
    mixing = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(9)).double())[0]
    return torch.logspace(0, -4, width, dtype=torch.float64)[:, None] * mixing


def summed(kind, width: int, batches: int) -> Triangle:
    total = kind.zeros(width, CPU)
    for number in range(batches):
        total.add_products(keys(64, width, number))
    return total.mean(64 * batches)


@pytest.mark.slow
def test_paired_sums_differ_from_float64_by_a_last_bit_of_float32():
    paired, exact = (summed(kind, 600, 200).full().double() for kind in (PairedTriangle, Triangle))
    scale = (exact.diagonal()[:, None] * exact.diagonal()).sqrt()
    assert float(((paired - exact).abs() / scale).max()) < 1.2e-7
    total, plain = Triangle.zeros(600, CPU), torch.zeros(600, 600)
    for number in range(200):
        total.add_products(keys(64, 600, number))
        plain += (keys(64, 600, number).T @ keys(64, 600, number)).float()
    uncompensated = ((plain.double() / 64 / 200 - exact).abs() / scale).max()
    assert float(uncompensated) > 3e-7, "which float32 by itself would not give"


def test_rows_times_a_triangle_are_rows_times_the_matrix():
    total, rows = summed(Triangle, 600, 2), keys(5, 600, 7)
    assert torch.allclose(rows @ total, rows @ total.full().double(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [4000, 300])
def test_solutions_are_those_of_float64(tokens):
    """Also of a covariance of fewer tokens than inputs, which is singular."""
    total = summed(Triangle, 400, -(-tokens // 64))
    asked = keys(6, 400, 123)
    ours, theirs = Refined.of(total), Whitening(cholesky(total.full()))
    found = ours.solve(asked)
    missing = (found @ total - asked).norm(dim=1) / asked.norm(dim=1)
    if tokens > 400:
        assert float(missing.max()) < 2e-8
        wanted = theirs.solve(asked)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-4
        left, right = (least_squares(basis, asked, regularization=0.1) for basis in (ours, theirs))
        assert float((left - right).norm() / right.norm()) < 1e-4
        past = keys(4, 400, 5)
        left, right = (least_squares(basis, asked, regularization=0.1, past=past) for basis in (ours, theirs))
        assert left.shape == (6, 400) and float((left - right).norm() / right.norm()) < 1e-4
    assert bool(found.isfinite().all())


def test_a_matrix_that_is_no_covariance_is_refused():
    total = summed(Triangle, 300, 10)
    total.blocks[0].diagonal().neg_()
    with pytest.raises(InputError, match="positive covariance"):
        Refined.of(total)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_methods_write_what_they_write_with_float64(family, monkeypatch):
    lm = make_lm(family)
    made = {}
    for large in (False, True):
        monkeypatch.setattr(triangle, "LARGE", 16 if large else 20_000)
        made[large] = [
            editor.edit(lm, [EDIT, OTHER])
            for editor in (ROME(layer=1, **QUICK), MEMIT(layers=(1, 2), **QUICK), EMMET(layer=1, **QUICK))
        ]
        assert {one.sums for one in statistics(lm, [1], tokens=200).values()} == {
            "float32 + bfloat16" if large else "float64"
        }
        lm.memo.clear()
    for ours, theirs in zip(made[True], made[False], strict=True):
        for name, delta in theirs.deltas.items():
            wanted = delta.dense()
            assert float((ours.deltas[name].dense() - wanted).norm() / wanted.norm()) < 1e-3


def test_a_killed_reading_of_a_large_layer_goes_on(monkeypatch, tmp_path):
    from reknow.editing import key_sums

    monkeypatch.setattr(triangle, "LARGE", 16)
    texts = ["Danielle Darrieux was born in Bordeaux and went to Paris."] * 400
    whole = covariance(make_lm(), 1, tokens=3000, text=texts)
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path))
    monkeypatch.setattr(key_sums, "_SAVE_SECONDS", 0.0)
    save, saved = key_sums.save, []

    def interrupted(*args):
        save(*args)
        saved.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(key_sums, "_BATCH_TOKENS", 512)
    monkeypatch.setattr(key_sums, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        covariance(make_lm(), 1, tokens=3000, text=texts)
    monkeypatch.setattr(key_sums, "save", save)
    resumed = covariance(make_lm(), 1, tokens=3000, text=texts)
    assert saved and torch.allclose(resumed, whole, rtol=1e-6, atol=1e-9 * float(whole.diagonal().max()))


def test_the_plan_of_an_edit_counts_what_the_large_way_takes(monkeypatch):
    lm, method = make_lm(), ROME(layer=1, **QUICK)
    small = cost.estimate(lm, method, [EDIT])
    monkeypatch.setattr(cost, "LARGE", 16)
    large = cost.estimate(lm, method, [EDIT])
    assert small.solver == 2 * large.solver > 0 and small.statistics == large.statistics


def test_null_spaces_of_large_layers_are_refused_before_anything_is_done(monkeypatch):
    monkeypatch.setattr(triangle, "LARGE", 16)
    lm = make_lm()
    monkeypatch.setattr(lm, "forward", None)
    with pytest.raises(InputError, match=r"whose directions can be found; layer 1 .* take memit, emmet or rome"):
        AlphaEdit(layers=(1, 2), **QUICK).edit_each(lm, [EDIT])
