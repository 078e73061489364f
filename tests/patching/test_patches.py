"""Patches add up, compare and can be cut to a rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import make_lm, some_patch
from reknow.errors import InputError, PatchError
from reknow.patching.deltas import LowRank
from reknow.patching.patches import diff, merge


@pytest.mark.parametrize("ranks", [(1, 1), (1, 20, 20), (2, None), (None, None)])
def test_a_merge_changes_the_weights_as_all_of_them(lm, ranks):
    patches = [
        some_patch(lm, i, rank=rank or 3, dense=rank is None, layers=(1, i % 2)) for i, rank in enumerate(ranks)
    ]
    merged = merge(patches)
    with lm.patched(*patches):
        wanted = {name: lm.weight(name).clone() for name in lm.parts.value}
    with lm.patched(merged):
        for name, weight in wanted.items():
            assert torch.allclose(lm.weight(name), weight, rtol=0, atol=1e-5)
    assert merged.edits == tuple(edit for patch in patches for edit in patch.edits)
    for name, delta in merged.deltas.items():
        dense = sum(p.deltas[name].dense() for p in patches if name in p.deltas)
        assert torch.allclose(delta.dense(), dense, atol=1e-5)
        assert delta.norm() == pytest.approx(float(dense.norm()), rel=1e-5)


def test_merged_rank_one_patches_stay_low_rank(lm):
    merged = merge([some_patch(lm, i) for i in range(3)])
    (delta,) = merged.deltas.values()
    assert isinstance(delta, LowRank) and delta.rank == 3
    assert merged.method == "rome" and merged.notes["merged"]
    assert merge([some_patch(lm), replace(some_patch(lm, 1), method="ft-m")]).method == "merged"


def test_a_merge_stands_on_what_its_parts_stood_on(lm):
    first = some_patch(lm, 1, made_on=("x" * 12,))
    second = some_patch(lm, 2, made_on=("x" * 12, first.id))
    assert merge([first, second]).made_on == ("x" * 12,)


def test_nothing_and_strangers_are_not_merged(lm):
    with pytest.raises(PatchError, match="at least one"):
        merge([])
    stranger = replace(some_patch(lm, 2), base=make_lm("gpt_neox").fingerprint)
    with pytest.raises(PatchError, match="other layers"):
        merge([some_patch(lm, 1), stranger])


def test_diff_tells_norms_cosine_and_edits(lm):
    name = lm.parts.value[1]
    a, b = some_patch(lm, 1), some_patch(lm, 2, dense=True, layers=(0, 1))
    found = diff(a, b)
    x, y = a.deltas[name].dense(), b.deltas[name].dense()
    row = found["matrices"][name]
    assert row["norm_a"] == pytest.approx(float(x.norm())) and row["norm_b"] == pytest.approx(float(y.norm()))
    assert row["cosine"] == pytest.approx(float((x * y).sum() / x.norm() / y.norm()))
    alone = found["matrices"][lm.parts.value[0]]
    assert alone["norm_a"] == 0 and alone["cosine"] is None
    assert found["same_base"] and found["edits_only_a"] == list(a.edits) and found["edits_both"] == []
    itself = diff(a, a)
    assert itself["matrices"][name]["cosine"] == pytest.approx(1) and itself["edits_both"] == list(a.edits)
    other = make_lm("llama", intermediate_size=48)
    stranger = replace(some_patch(other), deltas={name: next(iter(some_patch(other).deltas.values()))})
    found = diff(a, stranger)
    assert not found["same_base"] and found["matrices"][name]["cosine"] is None


def test_truncation_is_the_best_of_its_rank(lm):
    patch = some_patch(lm, rank=6, layers=(0, 1))
    for rank in (2, 6, 9):
        cut, error = patch.truncated(rank)
        worst = 0.0
        for name, delta in patch.deltas.items():
            singular = torch.linalg.svdvals(delta.dense())
            assert cut.deltas[name].rank == min(rank, 6)
            lost = float((cut.deltas[name].dense() - delta.dense()).norm() / delta.norm())
            best = float(singular[rank:].norm() / singular.norm())
            assert lost == pytest.approx(best, abs=1e-6)
            worst = max(worst, best)
        assert error == pytest.approx(worst, abs=1e-9)
        assert (cut.id == patch.id) == (rank >= 6)
    dense, error = some_patch(lm, rank=3, dense=True).truncated(3)
    assert all(isinstance(delta, LowRank) for delta in dense.deltas.values()) and error < 1e-6
    with pytest.raises(InputError, match="rank of at least 1"):
        patch.truncated(0)
