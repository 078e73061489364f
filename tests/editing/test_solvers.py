"""The least-squares core: normal equations, protected directions, limits, memory, independence of the keys' unit."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from reknow.editing.solvers import Whitening, cholesky, least_squares, null_space, rank_one, solve
from reknow.errors import EditFailed, InputError
from reknow.patching.deltas import as_delta

IN, OUT = 12, 5


def whitening(covariance):
    return Whitening(cholesky(covariance))


@pytest.fixture
def problem():
    """Covariance of keys of very different size, three keys of edits, and what their outputs lack."""
    generator = torch.Generator().manual_seed(1)
    general = torch.randn(200, IN, generator=generator, dtype=torch.float64) * torch.logspace(1, -3, IN)
    keys = torch.randn(3, IN, generator=generator, dtype=torch.float64)
    residual = torch.randn(3, OUT, generator=generator, dtype=torch.float64)
    return general.T @ general / 200, keys, residual


def test_memit_solves_its_normal_equations(problem):
    covariance, keys, residual = problem
    right = least_squares(whitening(covariance), keys, regularization=0, weight=7.0)
    change = residual.T @ right  # (out, in)
    assert torch.allclose(change @ (7 * covariance + keys.T @ keys), residual.T @ keys, atol=1e-8)


def test_more_facts_than_dimensions_give_the_same_equations(problem):
    covariance, _, _ = problem
    keys = torch.randn(30, IN, dtype=torch.float64)
    right = least_squares(whitening(covariance), keys, regularization=0, weight=7.0)  # (facts, in)
    assert torch.allclose(right @ (7 * covariance + keys.T @ keys), keys, atol=1e-8)


def test_without_regularization_every_key_gets_its_value(problem):
    covariance, keys, residual = problem
    change = residual.T @ least_squares(whitening(covariance), keys, regularization=0)
    assert torch.allclose(change @ keys.T, residual.T, atol=1e-6)


def test_without_regularization_one_key_is_rome(problem):
    covariance, keys, residual = problem
    right = least_squares(whitening(covariance), keys[:1], regularization=0)
    rome = rank_one(solve(cholesky(covariance), keys[:1])[0], keys[0], residual[0])
    assert torch.allclose(as_delta(residual[:1], right).dense(), rome.dense(), rtol=1e-5, atol=1e-8)


def test_emmet_with_a_ridge_is_memit_in_one_layer(problem):
    covariance, keys, _ = problem
    scaled = torch.linalg.inv(1000 * covariance)
    gram = keys @ scaled @ keys.T + 0.1 * torch.eye(3, dtype=torch.float64)
    emmet = torch.linalg.inv(gram) @ keys @ scaled  # (facts, in)
    ours = least_squares(whitening(covariance), keys, regularization=0, weight=0.1 * 1000)
    assert torch.allclose(ours, emmet, rtol=1e-6)


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_regularization_does_not_depend_on_the_unit_of_the_keys(problem, unit):
    covariance, keys, residual = problem
    for metric in (whitening, lambda c: null_space(c, 0.05)):
        plain = residual.T @ least_squares(metric(covariance), keys, regularization=0.3)
        other = residual.T @ least_squares(metric(unit**2 * covariance), unit * keys, regularization=0.3)
        assert torch.allclose(other @ (unit * keys).T, plain @ keys.T, atol=1e-7)


def test_regularization_is_the_share_that_one_fact_lacks(problem):
    covariance, keys, residual = problem
    change = residual[:1].T @ least_squares(whitening(covariance), keys[:1], regularization=0.25)
    assert torch.allclose(change @ keys[:1].T, residual[:1].T / 1.25)


def test_alphaedit_leaves_protected_directions_alone(problem):
    covariance, keys, residual = problem
    basis = null_space(covariance, 0.01)
    change = residual.T @ least_squares(basis, keys, regularization=0.1)
    _, vectors = torch.linalg.eigh(covariance)
    protected = vectors[:, basis.shape[1] :]
    assert 0 < protected.shape[1] < IN
    assert float((change @ protected).abs().max()) < 1e-9 * float(change.abs().max())


def test_alphaedit_solves_the_papers_system(problem):
    covariance, keys, residual = problem
    past = torch.randn(4, IN, dtype=torch.float64)
    basis = null_space(covariance, 0.0, threshold=0.05)
    projector = basis @ basis.T
    system = projector @ (keys.T @ keys + past.T @ past) + 10 * torch.eye(IN, dtype=torch.float64)
    wanted = torch.linalg.solve(system, projector @ keys.T @ residual)  # (in, out), as in the authors' code
    right = least_squares(basis, keys, regularization=0, weight=10.0, past=past)
    assert torch.allclose(residual.T @ right, wanted.T, atol=1e-10)


def test_keys_of_the_past_hold_against_a_like_key(problem):
    covariance, keys, _ = problem
    basis = null_space(covariance, 0.05)
    free = least_squares(basis, keys[:1], regularization=0.01)
    held = least_squares(basis, keys[:1], regularization=0.01, past=keys[:1].repeat(50, 1))
    assert float((held @ keys[0]).squeeze()) < 0.05 * float((free @ keys[0]).squeeze())


def test_null_space_counts_the_trace_from_below():
    covariance = torch.diag(torch.tensor([45.0, 45.0, 6.0, 3.0, 1.0]))
    assert null_space(covariance, 0.04).shape[1] == 2  # 1 + 3 of 100
    assert null_space(covariance, 0.0, threshold=6.5).shape[1] == 3
    with pytest.raises(InputError, match="raise the limit"):
        null_space(covariance, 0.005)


@pytest.mark.parametrize("sink", [100.5, 1e4, 1e9])
def test_the_direction_of_a_sink_is_no_part_of_the_trace(sink):
    """Else a share of the trace is more than all the other directions have together, and none is protected."""
    covariance = torch.diag(torch.tensor([45.0, sink, 45.0, 6.0, 3.0, 1.0]))
    basis = null_space(covariance, 0.04)
    assert basis.shape[1] == 2 and float(basis[1].abs().max()) == 0
    assert null_space(covariance, 0.0, threshold=6.5).shape[1] == 3
    assert null_space(torch.diag(torch.tensor([99.0, 45.0, 45.0, 6.0, 3.0, 1.0])), 0.05).shape[1] == 2  # of 199


def test_a_singular_system_names_the_facts(problem):
    covariance, keys, _ = problem
    keys = torch.cat([keys, keys[1:2]])
    with pytest.raises(EditFailed, match="'b' and 'd'"):
        least_squares(whitening(covariance), keys, regularization=0, names=["a", "b", "c", "d"])


def test_dead_units_do_not_stop_the_solver(problem):
    covariance, keys, _ = problem
    covariance = covariance.clone()
    covariance[3], covariance[:, 3] = 0, 0
    keys = keys.clone()
    keys[:, 3] = 0
    right = least_squares(whitening(covariance), keys, regularization=0.1)
    assert torch.isfinite(right).all()
    assert float(right[:, 3].abs().max()) == 0


def test_the_metric_is_never_written_out_but_multiplies_as_if_it_were(problem):
    covariance, keys, _ = problem
    basis = whitening(covariance)
    written = torch.linalg.inv(cholesky(covariance)).T  # B = L⁻ᵀ, (in, in)
    assert torch.allclose(written @ written.T @ covariance, torch.eye(IN, dtype=torch.float64), atol=1e-8)
    assert torch.allclose(keys @ basis, keys @ written, rtol=1e-9)
    assert torch.allclose(keys @ basis.T, keys @ written.T, rtol=1e-9)
    assert torch.allclose(solve(basis.factor, keys), keys @ written @ written.T, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_covariance_is_left_as_it_is(problem, dtype):
    """Both work in place, on a copy; also where the first try fails."""
    covariance = problem[0].to(dtype)
    singular = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=dtype))
    for matrix in (covariance, singular):
        before = matrix.clone()
        factor, basis = cholesky(matrix), null_space(matrix, 0.5)
        assert torch.equal(matrix, before) and factor.dtype == basis.dtype == torch.float64
        assert torch.allclose(factor @ factor.T, matrix.double(), atol=1e-6)
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))


def peak(work) -> float:
    """The most memory that the work holds at once, LAPACK's room included, in matrices of (WIDTH, WIDTH) float64."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events)) / (8 * WIDTH**2)


WIDTH = 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_matrix_beside_the_covariance_is_all_that_solving_takes(dtype):
    covariance, keys = torch.diag(torch.rand(WIDTH) + 0.5).to(dtype), torch.randn(8, WIDTH)
    singular = covariance.clone()
    singular[3] = 0
    assert 1 <= peak(lambda: solve(cholesky(covariance), keys)) < 1.1
    assert 1 <= peak(lambda: least_squares(whitening(singular), keys, regularization=0.1)) < 1.1
    # Two for LAPACK to find eigenvectors in; then those that are kept.
    assert 3 <= peak(lambda: least_squares(null_space(covariance, 0.9), keys, regularization=0.1)) < 3.1
