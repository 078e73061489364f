"""Patches go on and off without a trace."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from conftest import bits, make_lm, same, some_patch
from families import tiny_model, tiny_tokenizer
from reknow import LM
from reknow.errors import PatchError
from reknow.patching import weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- on and off ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_patches_come_off_in_any_order_to_the_base_s_bits(family, dtype, order):
    lm = LM((tiny_model(family).to(dtype), tiny_tokenizer()))
    base = bits(lm)
    patches = [some_patch(lm, 1), some_patch(lm, 2, dense=True, layers=(0, 1)), some_patch(lm, 3, rank=3)]
    alone = []
    for patch in patches:
        lm.apply(patch)
        alone.append(bits(lm))
        lm.revert(patch)
        assert same(bits(lm), base)
    for patch in patches:
        lm.apply(patch)
    assert not same(bits(lm), base)
    for i, which in enumerate(order):
        lm.revert(patches[which].id)
        if i == 1:
            assert same(bits(lm), alone[order[2]]), "what is left is as if it were applied alone"
    assert same(bits(lm), base) and lm.patches == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_is_the_base_plus_the_changes_cast_once(family, dtype):
    lm = LM((tiny_model(family).to(dtype), tiny_tokenizer()))
    name = lm.parts.value[1]
    base = lm.weight(name).double().clone()
    patches = [some_patch(lm, i, dense=i % 2 == 1, size=0.01) for i in range(6)]
    for patch in patches:
        lm.apply(patch)
    wanted = base + sum(patch.deltas[name].dense() for patch in patches)
    assert torch.allclose(lm.weight(name).double(), wanted.to(dtype).double(), rtol=1e-6, atol=1e-7)
    # Adding one after the other in half precision would round six times.
    assert torch.equal(lm.weight(name), wanted.to(dtype)) or dtype == torch.float32
    assert torch.equal(lm.base_weight(name).double(), base)


def test_half_precision_does_not_drift(family):
    lm = LM((tiny_model(family).to(torch.bfloat16), tiny_tokenizer()))
    base = bits(lm)
    keep = some_patch(lm, 0, size=0.003)
    lm.apply(keep)
    kept = bits(lm)
    for i in range(200):
        patch = some_patch(lm, i + 1, size=0.003)
        lm.apply(patch)
        lm.revert(patch)
    assert same(bits(lm), kept)
    lm.revert(keep)
    assert same(bits(lm), base)


def test_the_order_of_patches_matters_to_no_bit_that_counts(lm):
    name = lm.parts.value[1]
    patches = [some_patch(lm, i, dense=i == 1, size=1.0) for i in range(3)]
    with lm.patched(*patches):
        forth = lm.weight(name).clone()
    with lm.patched(*patches[::-1]):
        assert torch.allclose(lm.weight(name), forth, rtol=0, atol=1e-6)


def test_a_tall_stack_has_the_same_bits_however_it_was_built(lm, monkeypatch):
    monkeypatch.setattr(weights, "BLOCK", 3)
    patches = [some_patch(lm, seed=seed) for seed in range(10)]
    base = bits(lm)
    with lm.stacked(patches):
        at_once = bits(lm)
    with lm.patched():
        for patch in patches:
            lm.apply(patch)
        one_by_one = bits(lm)
        assert same(one_by_one, at_once)
        for taken in (patches[4], patches[9], patches[0]):
            lm.revert(taken)
        left = bits(lm)
    with lm.stacked([patch for i, patch in enumerate(patches) if i not in (0, 4, 9)]):
        assert same(bits(lm), left)
    assert same(bits(lm), base) and not lm._weights._sums


def test_contexts_restore_the_stack_on_errors(lm):
    first, second, third = (some_patch(lm, i) for i in range(3))
    lm.apply(first)
    before = bits(lm)
    with pytest.raises(KeyError), lm.patched(second, third):
        assert lm.patches == (first, second, third)
        raise KeyError
    assert lm.patches == (first,) and same(bits(lm), before)
    with pytest.raises(KeyError), lm.unpatched():
        assert lm.patches == ()
        raise KeyError
    assert lm.patches == (first,) and same(bits(lm), before)
    with pytest.raises(KeyError), lm.stacked([third, second]):
        assert lm.patches == (third, second)
        raise KeyError
    assert lm.patches == (first,) and same(bits(lm), before)


def test_a_second_patch_that_does_not_fit_takes_the_first_off_again(lm):
    good, bad = some_patch(lm, 1), some_patch(lm, 2)
    bad = replace(bad, base=make_lm("gpt_neox").fingerprint)
    before = bits(lm)
    with pytest.raises(PatchError), lm.patched(good, bad):
        raise AssertionError
    assert lm.patches == () and same(bits(lm), before)


def test_two_stacks_share_one_base(lm):
    mine, yours = [some_patch(lm, 1), some_patch(lm, 2)], [some_patch(lm, 2), some_patch(lm, 3, layers=(0,))]
    base = bits(lm)
    seen = []
    for stack in (mine, yours, mine):
        with lm.stacked(stack):
            seen.append(bits(lm))
    assert same(seen[0], seen[2]) and not same(seen[0], seen[1])
    assert same(bits(lm), base)
    with pytest.raises(PatchError, match="not applied yet"), lm.stacked([mine[0], mine[0]]):
        raise AssertionError


def test_a_patch_goes_on_once_and_comes_off_once(lm):
    patch = some_patch(lm)
    lm.apply(patch)
    with pytest.raises(PatchError, match="revert it first"):
        lm.apply(patch)
    lm.revert(patch)
    with pytest.raises(PatchError, match="applied: none"):
        lm.revert(patch)


def test_warnings_name_what_was_made_on_top(lm):
    first = some_patch(lm, 1)
    second = some_patch(lm, 2, made_on=(first.id,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.apply(first)
        lm.apply(second)
        lm.revert(second)
        lm.apply(second)
    with pytest.warns(UserWarning, match=f"{second.id}.*made on top of {first.id}"):
        lm.revert(first)
    lm.revert(second)
    with pytest.warns(UserWarning, match="made on top of 1 patches and is applied on 0"):
        lm.apply(second)


# --- refusals --------------------------------------------------------------------------------------------


def unlike(lm: LM, kind: str) -> LM:
    family = "gpt2" if "GPT2" in type(lm.model).__name__ else "llama"
    model, tokenizer = tiny_model(family), tiny_tokenizer(bos=family == "llama")
    if kind == "other weights":
        model = tiny_model(family, seed=1)
    elif kind == "slightly tuned":
        for parameter in model.parameters():
            parameter.data += 1e-4 * torch.randn_like(parameter)
    elif kind == "other tokenizer":
        tokenizer.backend_tokenizer.post_processor = None
        tokenizer.add_tokens(["Lima"])
    elif kind == "other sizes":
        model = tiny_model(family, vocab_size=330)
    return LM((model, tokenizer))


@pytest.mark.parametrize(
    ("kind", "difference"),
    [
        ("other weights", "other weights"),
        ("slightly tuned", "other weights"),
        ("other tokenizer", "another tokenizer"),
        ("other sizes", "other layers or sizes"),
    ],
)
def test_another_base_model_is_refused(lm, kind, difference):
    other, patch = unlike(lm, kind), some_patch(lm)
    before = bits(other)
    with pytest.raises(PatchError, match=difference) as refusal:
        other.apply(patch)
    assert patch.label in str(refusal.value) and "\n" not in str(refusal.value)
    assert same(bits(other), before) and other.patches == ()
    other.apply(patch, force=True)
    assert other.patches == (patch,) and not same(bits(other), before)


def test_the_fingerprint_is_the_base_s_whatever_is_applied(lm):
    patch = some_patch(lm)
    plain = lm.fingerprint.digest
    fresh = make_lm("gpt2" if "GPT2" in type(lm.model).__name__ else "llama")
    fresh.apply(patch, force=True)
    assert fresh.fingerprint.digest == plain
    assert unlike(lm, "slightly tuned").fingerprint.digest != plain


@pytest.mark.parametrize("name", ["no.such.matrix", "", "{stack}.embed", "{norm}", "{other}"])
def test_a_matrix_that_is_not_there_is_refused_though_forced(lm, name):
    patch = some_patch(lm)
    (delta,) = patch.deltas.values()
    names = {"stack": lm.parts.backbone, "norm": lm.parts.final_norm[0], "other": lm.parts.attention_out[0]}
    broken = replace(patch, deltas={lm.parts.value[0]: delta, name.format(**names): delta})
    before = bits(lm)
    with pytest.raises(PatchError, match="expected a matrix"):
        lm.apply(broken, force=True)
    assert same(bits(lm), before) and lm.patches == ()
    assert lm.base_weight(lm.parts.value[0]) is not None
    lm.apply(patch)  # nothing is left behind that would stand in the way


def test_a_sum_that_overflows_is_refused_and_undone(family):
    lm = LM((tiny_model(family).to(torch.float16), tiny_tokenizer()))
    before = bits(lm)
    small, huge = some_patch(lm, 1, layers=(0, 1)), some_patch(lm, 2, size=1e6, layers=(0, 1))
    lm.apply(small)
    edited = bits(lm)
    with pytest.raises(PatchError, match="overflows"):
        lm.apply(huge)
    assert lm.patches == (small,) and same(bits(lm), edited)
    lm.revert(small)
    assert same(bits(lm), before)


def test_huge_numbers_leave_no_trace(lm):
    before, patch = bits(lm), some_patch(lm, size=1e30)
    with lm.patched(patch):
        assert float(lm.weight(lm.parts.value[1]).abs().max()) > 1e28
    assert same(bits(lm), before)


def test_a_stack_takes_the_place_of_another_whole_or_not_at_all(lm):
    first, second = (some_patch(lm, seed=seed) for seed in (1, 2))
    base = bits(lm)
    lm.apply(first)
    lm.restack([second, first])
    assert lm.patches == (second, first)
    with pytest.raises(PatchError, match="not applied yet"):
        lm.restack([first, first])
    assert lm.patches == (second, first)
    lm.restack([])
    assert same(bits(lm), base)
