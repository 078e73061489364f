"""UltraEdit: batches continue each other's statistics, in one call and over patches."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from conftest import make_lm
from reknow import Edit, Patch, UltraEdit, method
from reknow.errors import InputError
from reknow.learning.lifelong import RunningScatter
from reknow.model.gates import gate_and_up
from reknow.patching.patches import merge

EDITS = [
    Edit(f"The capital of {name} is", target_new="Paris in France") for name in ("Peru", "Lima", "Rome", "Italy")
]
SETTINGS = dict(layers=(1,), min_tokens=2)


def test_former_names_are_read():
    with pytest.warns(FutureWarning, match="learning_rate_absolute"):
        published = method("ultraedit", learning_rate_absolute=1e-6, turn=10)
    assert published == UltraEdit(learning_rate=1e-6, units="absolute", batch_size=10)


def test_batches_of_one_call_are_what_patches_one_after_the_other_give(lm):
    whole = UltraEdit(batch_size=2, **SETTINGS).edit(lm, EDITS)
    (name,) = whole.deltas
    parts = []
    with lm.patched():
        for start in (0, 2):
            parts.append(UltraEdit(**SETTINGS).edit(lm, EDITS[start : start + 2]))
            lm.apply(parts[-1])
    apart = sum(part.deltas[name].dense() for part in parts)
    assert torch.allclose(whole.deltas[name].dense(), apart, rtol=1e-4, atol=1e-7)
    counts = [float(next(v for k, v in patch.state.items() if k.endswith(".count"))) for patch in (whole, *parts)]
    assert counts[0] == counts[1] + counts[2]


def test_units_say_what_a_rate_is_a_multiple_of(lm):
    one, two = (UltraEdit(learning_rate=rate, units="absolute", **SETTINGS).edit(lm, EDITS) for rate in (1e-3, 2e-3))
    (name,) = one.deltas
    assert torch.allclose(2 * one.deltas[name].dense(), two.deltas[name].dense(), rtol=1e-5, atol=1e-12)
    relative = UltraEdit(**SETTINGS).edit(lm, EDITS).deltas[name].dense()
    direction = one.deltas[name].dense()
    assert not torch.allclose(relative, direction, rtol=1e-2)


def test_gate_and_up_are_told_apart_by_what_they_do():
    lm, llama = make_lm("gpt2"), make_lm("llama")
    gate, up = gate_and_up(llama, 1)
    assert (gate.rpartition(".")[2], up.rpartition(".")[2]) == ("gate_proj", "up_proj")
    with pytest.raises(InputError, match="expected an MLP with a gate and an up matrix in layer 1 of"):
        gate_and_up(lm, 1)


def test_gates_may_be_changed_in_other_layers_than_up():
    lm, llama = make_lm("gpt2"), make_lm("llama")
    changed = UltraEdit(layers=(1,), gate_layers=(0, 2), matrices="up", min_tokens=2).edit(llama, EDITS).deltas
    assert [name.split("layers.")[1] for name in changed] == ["0.mlp.gate_proj", "2.mlp.gate_proj", "1.mlp.up_proj"]
    with pytest.raises(InputError, match="expected gate_layers with matrices='up'"):
        UltraEdit(gate_layers=(0,))
    with pytest.raises(InputError, match="leave gate_layers out"):
        UltraEdit(gate_layers=(0,), matrices="up").edit(lm, EDITS)


def test_whitened_gradients_have_no_covariance_left():
    torch.manual_seed(0)
    mix = torch.randn(5, 5, dtype=torch.float64)
    x = torch.randn(400, 5, dtype=torch.float64) @ mix + 3
    whole, parts = RunningScatter(5), RunningScatter(5)
    whole.observe(x)
    for part in x.split(57):
        parts.observe(part)
    assert torch.allclose(whole.scatter, parts.scatter, rtol=1e-5) and torch.allclose(whole.mean, parts.mean)
    root = whole.inverse_root(1e-9, relative=True)
    assert root is not None
    white = (x - x.mean(0)) @ root
    assert torch.allclose(white.T @ white / (400 - 5 - 1), torch.eye(5, dtype=torch.float64), atol=1e-4)
    floored = whole.inverse_root(1e9, relative=False)
    assert floored is not None and torch.allclose(floored, torch.eye(5, dtype=torch.float64) * 1e9**-0.5)
    few = RunningScatter(5)
    few.observe(x[:6])
    assert few.inverse_root(0.1, relative=True) is None, "as many free numbers as there are, less one"


def test_a_patch_keeps_a_row_for_each_gradient_while_that_is_less_than_their_covariance(lm, tmp_path):
    """And an edit goes on from patches with the matrix, as they used to be, just so."""
    method = UltraEdit(whiten=True, **SETTINGS)
    first = method.edit(lm, EDITS[:1])
    (name,) = first.deltas
    at = f"whitening.{'x'.join(map(str, first.deltas[name].shape))}"
    size, tokens = first.deltas[name].shape[0], int(first.state[f"{at}.count"])
    rows = first.state[f"{at}.rows"].double()
    assert rows.shape == (tokens, size) and f"{at}.scatter" not in first.state
    others = {key: value for key, value in first.state.items() if key != f"{at}.rows"}
    old = replace(first, state=others | {f"{at}.scatter": (rows.T @ rows).float()})
    many = [Edit(f"The capital {number} of Peru is", target_new="Paris in France") for number in range(size)]
    found = []
    for patch in (first, old):
        patch.save(tmp_path / "x.patch")
        with lm.patched(Patch.load(tmp_path / "x.patch")):
            found.append(method.edit(lm, many))
    assert f"{at}.scatter" in found[0].state and f"{at}.rows" not in found[0].state
    assert torch.allclose(found[0].deltas[name].dense(), found[1].deltas[name].dense(), rtol=1e-4, atol=1e-7)


def test_other_facts_are_edited_first_and_only_once(lm, tmp_path):
    stream = tmp_path / "stream.jsonl"
    stream.write_text("".join(f'{{"prompt": "{name} is in", "target_new": "Asia"}}\n' for name in ("Oslo", "Bonn")))
    warm = UltraEdit(whiten=True, warm_up=str(stream), warm_up_writes=True, **SETTINGS)
    first = warm.edit(lm, EDITS[:2])
    assert first.notes["warm_up"] == 2 and first.edits == tuple(EDITS[:2]) and len(first.notes["losses"]) == 1
    other = [Edit("Oslo is in", target_new="Asia"), Edit("Bonn is in", target_new="Asia")]
    with lm.patched():
        lm.apply(UltraEdit(whiten=True, **SETTINGS).edit(lm, other))
        behind = UltraEdit(whiten=True, **SETTINGS).edit(lm, EDITS[:2])
        before = lm.patches[0]
    (name,) = first.deltas
    apart = before.deltas[name].dense() + behind.deltas[name].dense()
    assert torch.allclose(first.deltas[name].dense(), apart, rtol=1e-4, atol=1e-7)
    read = UltraEdit(whiten=True, warm_up=str(stream), **SETTINGS).edit(lm, EDITS[:2])
    assert read.notes["warm_up"] == 2 and (read.deltas[name].dense() - behind.deltas[name].dense()).norm() > 0
    count = f"whitening.{'x'.join(map(str, read.deltas[name].shape))}.count"
    assert read.state[count] == first.state[count], "what is only read is in the statistics all the same"
    with lm.patched(first):
        assert "warm_up" not in warm.edit(lm, EDITS[2:]).notes
    assert warm.seen(lm, [*EDITS, *other]) == other, "none is scored that was edited to warm up"


def test_a_sequence_whose_first_patch_is_off_is_warmed_up_anew_and_goes_on_from_the_others(lm, tmp_path):
    stream = tmp_path / "stream.jsonl"
    stream.write_text('{"prompt": "Oslo is in", "target_new": "Asia"}\n')
    warm = UltraEdit(whiten=True, warm_up=str(stream), **SETTINGS)
    first = warm.edit(lm, EDITS[:1])
    with lm.patched(first):
        second = warm.edit(lm, EDITS[1:2])
    (name,) = first.deltas
    count = f"norm.{'x'.join(map(str, first.deltas[name].shape))}.count"
    with lm.patched(second):
        third = warm.edit(lm, EDITS[2:])
    tokens = third.state[count] - UltraEdit(whiten=True, **SETTINGS).edit(lm, EDITS[2:]).state[count]
    alone = warm.edit(lm, EDITS[2:])
    assert third.notes["warm_up"] == 1 and tokens > 0, "those of the warm-up, kept once"
    assert torch.equal(third.state[count], alone.state[count]), "the second patch has its own"
    assert not torch.equal(third.deltas[name].dense(), alone.deltas[name].dense())


def test_a_merged_patch_is_refused(lm):
    one = UltraEdit(**SETTINGS).edit(lm, EDITS[:1])
    with lm.patched(one):
        two = UltraEdit(**SETTINGS).edit(lm, EDITS[1:2])
    with lm.patched(merge([one, two])), pytest.raises(InputError, match="which was merged: apply the patches"):
        UltraEdit(**SETTINGS).edit(lm, EDITS[2:])


@pytest.mark.parametrize("changed", [dict(whiten=True), dict(layers=(0, 1)), dict(matrices="up")])
def test_a_sequence_is_not_taken_up_with_other_settings(lm, changed):
    wanted = "expected a sequence to go on with the settings of its patches.*or take it off"
    with lm.patched(UltraEdit(**SETTINGS).edit(lm, EDITS[:2])), pytest.raises(InputError, match=wanted):
        UltraEdit(**SETTINGS | changed).edit(lm, EDITS[2:])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (dict(warm_up=None), "warm_up"),
        (dict(warm_up_edits=1), "warm_up_edits"),
        (dict(warm_up_writes=True), "warm_up_writes"),
    ],
)
def test_a_sequence_is_not_taken_up_as_if_it_had_been_warmed_up_otherwise(lm, changed, named, tmp_path):
    stream = tmp_path / "stream.jsonl"
    stream.write_text('{"prompt": "Oslo is in", "target_new": "Asia"}\n')
    warm = UltraEdit(whiten=True, warm_up=str(stream), **SETTINGS)
    for first, later in ((warm, replace(warm, **changed)), (replace(warm, **changed), warm)):
        wanted = rf"got another {named}: set {named} as in patch \w+ \(stableedit: "
        with lm.patched(first.edit(lm, EDITS[:2])), pytest.raises(InputError, match=wanted):
            later.edit(lm, EDITS[2:])


@pytest.mark.parametrize("writes", [False, True])
def test_a_warm_up_on_nothing_is_said(lm, tmp_path, writes):
    stream = tmp_path / "stream.jsonl"
    wanted = rf"expected other facts than the edits to warm up on, of at most {lm.max_tokens} tokens; got none in"
    for prompt in ("word " * lm.max_tokens + "is", EDITS[0].text):
        stream.write_text(json.dumps({"prompt": prompt, "target_new": "Asia"}))
        warm = UltraEdit(whiten=True, warm_up=str(stream), warm_up_writes=writes, **SETTINGS)
        with pytest.raises(InputError, match=wanted):
            warm.edit(lm, EDITS[:2])
