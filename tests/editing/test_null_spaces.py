"""Null spaces while edit follows edit, and directions of the weights themselves, by the equations of their papers."""

from __future__ import annotations

import pytest
import torch

from conftest import make_lm
from reknow import AlphaEdit, Edit
from reknow.editing.null_spaces import leaky_null_space, refreshed_with, remaining
from reknow.editing.principal import principal_directions, spare_directions
from reknow.editing.solvers import least_squares, null_space
from reknow.errors import EditFailed, InputError
from reknow.methods import method
from reknow.patching.deltas import Dense, LowRank

IN, OUT = 12, 5
EDITS = [
    Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    Edit("{} is a city in", subject="Lima", target_new="Italy"),
]
QUICK = dict(layers=(0, 1), context_groups=(), covariance_tokens=1000, steps=6)


@pytest.fixture
def problem():
    """C of keys of very different size, the keys of an edit and of earlier ones, and what the edit's outputs lack."""
    generator = torch.Generator().manual_seed(1)
    general = torch.randn(200, IN, generator=generator, dtype=torch.float64) * torch.logspace(1, -3, IN)
    keys, past = torch.randn(2, 3, IN, generator=generator, dtype=torch.float64)
    return general.T @ general / 200, keys, past, torch.randn(3, OUT, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("refreshed", [False, True])
def test_betaedit_solves_the_papers_system(problem, refreshed):
    covariance, keys, past, residual = problem
    protected = (past.T @ past / 3 + 2 * covariance) / 3 if refreshed else None
    space = leaky_null_space(covariance, 0.0, threshold=0.5, protected=protected)
    basis = null_space(covariance if protected is None else protected, 0.0, threshold=0.5)
    projector = basis @ basis.T
    system = projector @ (keys.T @ keys + past.T @ past + 2 * covariance) + 10 * torch.eye(IN)
    wanted = torch.linalg.solve(system, projector @ keys.T @ residual).T  # (out, in)
    right = least_squares(space.metric(2.0, 10.0), keys, weight=1.0, past=past)
    assert torch.allclose(residual.T @ right, wanted, atol=1e-10)
    assert torch.allclose(space.basis.T @ covariance @ space.basis, torch.diag(space.leakage), atol=1e-10)


def test_all_directions_of_betaedit_are_memit_with_history(problem):
    """Where nothing is out of reach and λ₂ is 0, the penalty is MEMIT's λC."""
    covariance, keys, past, _ = problem
    right = least_squares(
        leaky_null_space(covariance, 0.0, threshold=1e9).metric(7.0, 0.0), keys, weight=1.0, past=past
    )
    wanted = torch.linalg.solve(7 * covariance + keys.T @ keys + past.T @ past, keys.T).T
    assert torch.allclose(right, wanted, rtol=1e-6, atol=1e-9)


def test_leakage_is_measured_by_the_share_that_a_fact_lacks(problem):
    covariance, keys, _, _ = problem
    space = leaky_null_space(covariance, 0.05)
    weight = 0.25 * space.typicality(keys[:1])
    right = least_squares(space.metric(weight, 0.0), keys[:1], weight=1.0)
    assert float(right @ keys[0]) == pytest.approx(1 / 1.25)


@pytest.mark.parametrize(
    ("made", "every", "known"),
    [([], 2, 0), ([1], 2, 0), ([2], 2, 2), ([1, 1], 2, 2), ([1, 1, 1], 2, 2), ([2, 2, 1], 2, 4), ([5, 1, 1], 3, 5)],
)
def test_a_null_space_is_refreshed_every_so_many_edits(made, every, known):
    assert refreshed_with(made, every) == known


def test_evoedit_takes_used_directions_away_from_the_projector(problem):
    covariance, keys, past, _ = problem
    basis = null_space(covariance, 0.0, threshold=10.0)
    left = remaining(basis, past)
    used = torch.linalg.qr((past @ basis @ basis.T).T)[0]  # Q of P K_pᵀ, (in, earlier edits)
    assert torch.allclose(left @ left.T, basis @ basis.T - used @ used.T, atol=1e-9)
    assert float((left.T @ past.T).abs().max()) < 1e-9
    again = remaining(left, keys)  # one after the other or both at once
    both = remaining(basis, torch.cat([past, keys]))
    assert torch.allclose(again @ again.T, both @ both.T, atol=1e-9)


def test_edits_of_one_key_use_one_direction(problem):
    covariance, _, past, _ = problem
    basis = null_space(covariance, 0.0, threshold=10.0)
    again = torch.cat([past, past.float().double(), past])  # as patches keep them
    assert remaining(basis, again).shape == remaining(basis, past).shape
    one, many = (left @ left.T for left in (remaining(basis, past), remaining(basis, again)))
    assert torch.allclose(one, many, atol=1e-5)


def test_a_null_space_that_is_used_up_is_said_to_be(problem):
    covariance, keys, past, _ = problem
    basis = null_space(covariance, 0.0, threshold=1e-3)
    with pytest.raises(EditFailed, match=r"6 edits have used all .* raise null_share, or take betaedit"):
        remaining(basis[:, :5], torch.cat([keys, past]))


def test_after_evoedit_no_later_edit_moves_an_earlier_key():
    lm = make_lm("gpt2")
    made = {name: method(name, null_share=0.5, **QUICK) for name in ("evoedit", "alphaedit")}
    moved = {}
    for name, each in made.items():
        first = each.edit(lm, EDITS[:1])
        with lm.patched(first):
            second = each.edit(lm, EDITS[1:])
        matrix = lm.parts.value[0]
        keys, change = first.state[f"keys.{matrix}"].double(), second.deltas[matrix].dense()
        moved[name] = float((change @ keys.T).norm() / keys.norm() / change.norm())
    assert moved["evoedit"] < 1e-5 < 1e-3 < moved["alphaedit"]


@pytest.mark.parametrize("name", ["betaedit", "evoedit", "sphere"])
def test_the_same_fact_edited_again_does_no_harm(name):
    lm = make_lm("gpt2")
    editor = method(name, null_share=0.5, **QUICK)
    first = editor.edit(lm, EDITS)
    with lm.patched(first):
        again = editor.edit(lm, EDITS)
    matrix = lm.parts.value[0]
    assert again.deltas[matrix].norm() < 2 * first.deltas[matrix].norm()


def test_directions_are_spared_as_sphere_has_it():
    generator = torch.Generator().manual_seed(0)
    weight, left, right = (torch.randn(*size, generator=generator) for size in ((OUT, IN), (OUT, 2), (2, IN)))
    directions = principal_directions(weight, 0.5)
    rows = weight.double() / weight.double().norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(rows.T @ rows / OUT).flip(0)
    count = directions.shape[1]
    assert values[:count].sum() > 0.5 * values.sum() >= values[: count - 1].sum()
    projector = torch.eye(IN) - 0.25 * directions @ directions.T
    for change in (LowRank(left, right), Dense(left @ right)):
        spared = spare_directions(change, directions, 0.25).dense()
        assert torch.allclose(spared, (left @ right).double() @ projector, atol=1e-5)
    assert principal_directions(weight, 1.0).shape[1] <= IN


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"leakage": -1}, "expected leakage of at least 0; got -1"),
        ({"refresh": 0}, "expected refresh of at least 1; got 0"),
        ({"suppression": 2}, "expected suppression from 0 to 1; got 2"),
        ({"principal_share": -0.1}, "expected principal_share from 0 to 1; got -0.1"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings, wrong):
    with pytest.raises(InputError, match=wrong):
        AlphaEdit(**settings)
