"""The covariance of a mixture: a block for each expert, and what is solved with it."""

from __future__ import annotations

import pytest
import torch
from test_covariance import TEXTS, by_hand, own_cache  # noqa: F401, a fixture

import reknow.editing.key_sums
from conftest import close, make_lm
from reknow import MEMIT, Edit, method
from reknow.editing import factors
from reknow.editing.by_expert import _RIDGE, Diagonal, ExpertWhitening
from reknow.editing.covariance import covariance, covariance_triangle, statistics
from reknow.editing.key_sums import _resume
from reknow.editing.solvers import least_squares
from reknow.errors import InputError
from reknow.evaluation.cost import estimate

EXPERTS = 4


def in_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with 0 for what is of two experts."""
    inner = len(matrix) // EXPERTS
    return matrix * torch.block_diag(*[torch.ones(inner, inner, dtype=matrix.dtype)] * EXPERTS).to(matrix.device)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_it_is_the_mean_over_all_tokens_of_what_each_expert_gets(family):
    lm = make_lm(family)
    found = covariance(lm, 1, text=TEXTS[:2] + TEXTS[3:], tokens=1000)
    wanted = by_hand(lm, 1, TEXTS, 1000)
    assert found.shape == wanted.shape and close(found.double(), in_blocks(wanted), 1e-5)
    assert not close(found.double(), wanted, 1e-3), "what is of two experts is not 0 in itself"
    (again,) = statistics(lm, [1], text=TEXTS[:2] + TEXTS[3:], tokens=1000).values()  # from its file
    assert torch.equal(again.covariance, found) and again.sums == "float64"


def test_a_running_sum_is_taken_up(monkeypatch, tmp_path):
    lm, file = make_lm("olmoe"), []
    monkeypatch.setattr(reknow.editing.key_sums, "_SAVE_SECONDS", 0.0)
    own = reknow.editing.key_sums.save

    def kept(tensors, path, about):
        own(tensors, tmp_path / "sums.safetensors", about)
        file.append(about["count"])

    monkeypatch.setattr(reknow.editing.key_sums, "save", kept)
    wanted = covariance(lm, 1, text=TEXTS[:2] + TEXTS[3:], tokens=1000)
    name = lm.parts.value[1]
    totals, count, following = _resume(tmp_path / "sums.safetensors", {name: (len(wanted), EXPERTS)})
    assert count == int(file[-1]) and following == len(file)
    assert torch.equal(totals[name].mean(count).full().to(wanted.device), wanted)


def some_covariance(experts: int = EXPERTS, inner: int = 6) -> Diagonal:
    total = reknow.editing.key_sums.zero_sums(experts * inner, experts, torch.device("cpu"))
    assert isinstance(total, Diagonal)
    keys = torch.randn(50, experts, inner, generator=torch.Generator().manual_seed(0))
    keys[:, 2] = 0  # one that no text reaches
    keys[torch.arange(50), torch.arange(50) % 2] = 0
    total.add_products(keys.flatten(1))
    return total.mean(50)


def test_what_is_solved_with_it_is_what_the_whole_matrix_gives():
    found = some_covariance()
    whole = found.full().double()
    assert len(found) == len(whole) == 24 and torch.equal(whole, in_blocks(whole))
    whole.diagonal().add_(_RIDGE * whole.diagonal().mean())
    keys = torch.randn(3, 24, generator=torch.Generator().manual_seed(1)).double()
    assert close(ExpertWhitening(found).solve(keys), torch.linalg.solve(whole, keys.T).T, 1e-6)
    basis = torch.linalg.cholesky(whole).inverse().T  # B with B Bᵀ = C⁻¹
    assert close(keys @ ExpertWhitening(found).T, keys @ basis.T, 1e-6)
    for settings in (dict(regularization=0.1), dict(weight=3.0), dict(weight=1.0, past=keys[2:])):
        wanted = least_squares(basis, keys[:2], **settings)
        assert close(least_squares(ExpertWhitening(found), keys[:2], **settings), wanted, 1e-5)


def test_experts_that_no_key_reaches_are_not_looked_at():
    basis = ExpertWhitening(some_covariance())
    keys = torch.zeros(2, 24)
    keys[:, 6:12] = 1
    solved = basis.solve(keys)
    assert bool((solved[:, 6:12] != 0).all()) and not solved[:, :6].any() and not solved[:, 12:].any()
    assert list(basis.factors) == [1]


def test_a_cache_counts_the_factors_that_are_still_to_come(monkeypatch):
    basis, keys = ExpertWhitening(some_covariance()), torch.ones(1, 24)
    before = basis.nbytes
    basis.solve(keys)
    held = sum(factor.nbytes for factor in basis.factors.values())
    assert len(basis.factors) == EXPERTS and before == basis.nbytes == held + 4 * 4 * 36
    lm, memit = make_lm("olmoe"), MEMIT(covariance_tokens=60)
    size = memit.whitening(lm, 0).nbytes
    monkeypatch.setattr(factors, "_CACHE_BYTES", size + 1)
    wide = torch.ones(1, len(memit.whitening(lm, 0).covariance))
    for layer in range(2):
        memit.whitening(lm, layer).solve(wide)
    kept = [made for key, made in lm.memo.items() if key[0] == "covariance"]
    assert sum(one.nbytes for one in kept) <= size + 1 and len(kept) == 1


EDIT = Edit("I know {}", subject="Danielle Darrieux", target_new="of")


def test_a_layer_as_wide_as_those_of_real_mixtures_needs_no_matrix_of_its_width(monkeypatch):
    lm = make_lm("olmoe", intermediate_size=1500)  # 4 · 1,500 inputs
    monkeypatch.setattr(reknow.editing.triangle, "LARGE", 4000)
    patch = method("memit", layers=(2,), context_groups=(), covariance_tokens=60).edit(lm, [EDIT])
    assert patch.deltas[lm.parts.value[2]].shape == (32, 6000)
    found = covariance_triangle(lm, 2, tokens=60)
    assert isinstance(found, Diagonal) and max(block.shape[1] for block in found.blocks) == 1500
    whole = estimate(lm, method("memit", layers=(2,)), [EDIT])
    assert whole.statistics == 4 * sum(block.numel() for block in found.blocks)
    with pytest.raises(InputError, match=r"at most 4,000 inputs.*take memit, emmet or rome"):
        method("alphaedit", layers=(2,), context_groups=(), covariance_tokens=60).edit(lm, [EDIT])
