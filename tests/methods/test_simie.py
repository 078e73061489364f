"""SimIE: the authors' numbers, what it minimises, and what it refuses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from test_golden import GOLDEN, close

from conftest import make_lm
from reknow import LM, METHODS, Edit, Patch, method
from reknow.contract import Method, make_patch
from reknow.editing.layer_choice import LayerScore, keep_scores
from reknow.errors import InputError
from reknow.evaluation.cost import estimate
from reknow.patching.deltas import LowRank
from reknow.patching.patches import merge
from reknow.registry import Row

THEIRS = load_file(GOLDEN / "simie.safetensors")
ABOUT = json.loads((GOLDEN / "simie.json").read_text())
EDITS = [Edit(prompt, target_new=answer) for prompt, answer in ABOUT["edits"]]
MATRICES = [f"transformer.h.{layer}.mlp.c_proj" for layer in (0, 1)]


@dataclass(frozen=True)
class Given(Method):
    """Makes the changes that the authors' code was given."""

    name: ClassVar[str] = "given"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        number = EDITS.index(edits[0])
        parts = {name: [THEIRS[f"change_{number}/{name}/{side}"] for side in ("left", "right")] for name in MATRICES}
        return make_patch(self, lm, edits, {name: LowRank(*factors) for name, factors in parts.items()})


@pytest.fixture
def golden(monkeypatch) -> LM:
    monkeypatch.setitem(METHODS, "given", Row(Given, {}, "no paper's"))
    return LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)


@pytest.mark.golden
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("afresh", "case"), [(True, "afresh"), (False, "on")])
def test_the_authors_weights(golden, afresh, case, together):
    simie = method("simie", base="given", ridge=ABOUT["ridge"], units="absolute", afresh=afresh)
    groups = [EDITS] if together else [[edit] for edit in EDITS]
    moved = {name: torch.zeros(32, 40, dtype=torch.float64) for name in MATRICES}
    done = 0
    for group in groups:
        golden.apply(simie.edit(golden, group))
        done += len(group)
        for name in MATRICES:
            moved[name] += golden.patches[-1].deltas[name].dense()
            assert close(moved[name], THEIRS[f"{case}_{done - 1}/{name}"], 2e-4), (name, done)


def test_it_is_the_best_compromise_between_all_edits_and_the_first_weights(golden):
    """The gradient of Σ ‖(W − Ŵ_i) K_i‖² + λ‖W − W₀‖² is zero, whatever the edits were grouped by."""
    simie = method("simie", base="given", ridge=0.5)
    for group in (EDITS[:2], EDITS[2:]):
        golden.apply(simie.edit(golden, group))
    name, given = MATRICES[1], [Given().edit(golden, [edit]).deltas[MATRICES[1]].dense() for edit in EDITS]
    moved = torch.stack([patch.deltas[name].dense() for patch in golden.patches]).sum(0)
    unit = float(golden.patches[0].state[f"unit.{name}"])
    assert float(golden.patches[1].state[f"unit.{name}"]) == unit, "λ stays what it was"
    with golden.unpatched():
        keys = [_keys(golden, edit, name) for edit in EDITS]
    pull = sum((moved - change) @ k.T @ k for change, k in zip(given, keys, strict=True))
    size = sum((change @ k.T @ k).norm() for change, k in zip(given, keys, strict=True))
    assert (pull + 0.5 * unit * moved).norm() < 1e-4 * size


@pytest.mark.parametrize("afresh", [True, False])
def test_a_patch_keeps_a_row_and_has_a_rank_for_each_token(afresh):
    lm, edits = make_lm(), [Edit("I know", target_new="of"), Edit("I am", target_new="in")]
    settings = dict(base="ft-m", base_settings='{"layer": 1, "steps": 2}', afresh=afresh)
    patch, name = method("simie", **settings).edit(lm, edits), lm.parts.value[1]
    wide, tokens = lm.weight(name).shape[1], sum(len(_keys(lm, edit, name)) for edit in edits)
    assert tokens < wide / 4 and patch.state[f"inputs.{name}"].shape == (tokens, wide)
    assert isinstance(patch.deltas[name], LowRank) and patch.deltas[name].rank == tokens


def test_more_tokens_than_the_matrix_is_wide_are_kept_as_so_many_rows(tmp_path):
    lm = LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)
    edits = [Edit(f"{EDITS[0].prompt} {i}", target_new=EDITS[0].target_new) for i in range(9)]
    settings = dict(base="ft-m", base_settings='{"layer": 1, "steps": 2}')
    patch, name = method("simie", **settings).edit(lm, edits), MATRICES[1]
    keys = torch.cat([_keys(lm, edit, name) for edit in edits])
    kept = patch.state[f"inputs.{name}"].double()
    assert len(keys) > 40 and kept.shape == (40, 40)
    assert torch.allclose(kept.T @ kept, keys.T @ keys, rtol=1e-4, atol=1e-5)
    patch.save(tmp_path / "x.patch")
    assert Patch.load(tmp_path / "x.patch") == patch


def test_a_sequence_goes_on_from_patches_that_keep_the_sum(golden, tmp_path):
    """As patches did before they kept the inputs themselves."""
    simie = method("simie", base="given")
    first = simie.edit(golden, EDITS[:1])
    with golden.patched(first):
        wanted = simie.edit(golden, EDITS[1:])
    sums = {f"gram.{name}": (keys := first.state[f"inputs.{name}"]).T @ keys for name in MATRICES}
    replace(first, state=sums | {f"unit.{name}": first.state[f"unit.{name}"] for name in MATRICES}).save(
        tmp_path / "old.patch"
    )
    with golden.patched(Patch.load(tmp_path / "old.patch")):
        found = simie.edit(golden, EDITS[1:])
    for name in MATRICES:
        assert close(found.deltas[name].dense(), wanted.deltas[name].dense(), 1e-4)


def _keys(lm: LM, edit: Edit, name: str) -> torch.Tensor:
    (ids,) = (lm.tokenizer(f"{edit.prompt} {edit.target_new}")["input_ids"],)
    seen = []
    handle = lm.model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        lm.model(torch.tensor([ids]))
    handle.remove()
    return seen[0]


def test_what_it_needs_is_what_its_base_needs():
    bare = Edit("The capital of Peru is", target_new="of")
    lm = make_lm()
    with pytest.raises(InputError, match="needs a subject"):
        method("simie").edit(lm, [bare])
    quick = json.dumps({"layer": 1, "steps": 2})
    patch = method("simie", base="ft-m", base_settings=quick).edit(lm, [bare])
    assert list(patch.deltas) == [lm.parts.value[1]] and patch.method == "simie"


def test_a_plan_counts_what_its_base_does():
    lm, edits = make_lm(), [Edit("I know {}", subject="Lima", target_new="of")]
    quick = {"layer": 1, "steps": 7, "covariance_tokens": 100}
    wrapped, alone = method("simie", base_settings=json.dumps(quick)), method("rome", **quick)
    assert estimate(lm, wrapped, edits) == estimate(lm, alone, edits)


@dataclass(frozen=True)
class Wrapper(Method):
    """A wrapper with no field that says so."""

    name: ClassVar[str] = "wrapper"

    def at_work(self, lm: LM) -> Method:
        return method("rome", layer=1, steps=7, covariance_tokens=100).resolve(lm)

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        return self.at_work(lm).edit(lm, edits)


def test_a_plan_asks_the_method_whose_work_it_is():
    lm, edits = make_lm(), [Edit("I know {}", subject="Lima", target_new="of")]
    assert estimate(lm, Wrapper(), edits) == estimate(lm, Wrapper().at_work(lm), edits)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (dict(base="grace"), "expected a method that changes weights as base; got grace"),
        (dict(base="simie"), "expected a method that changes weights as base; got simie"),
        (dict(base="rmoe"), "Did you mean 'rome'"),
        (dict(base_settings="layer=5"), "expected base_settings as JSON"),
        (dict(base_settings="[5]"), "expected base_settings as JSON"),
        (dict(base_settings='{"layr": 5}'), "Did you mean 'layer'"),
    ],
)
def test_what_is_no_base_is_refused(settings, wanted):
    with pytest.raises(InputError, match=wanted):
        method("simie", **settings)


def test_a_memory_with_its_papers_settings_is_no_base_either(golden):
    with pytest.raises(InputError, match="expected a method that changes weights as base; got ike-paper"):
        method("simie", base="ike-paper").edit(golden, EDITS)


def test_a_sequence_is_not_taken_up_with_other_settings(golden):
    first = method("simie", base="given")
    with golden.patched(first.edit(golden, EDITS[:1])):
        for other in (dict(ridge=2.0), dict(base="ft-m"), dict(afresh=False)):
            with pytest.raises(InputError, match=f"settings of its patches; got {next(iter(other))} other than in"):
                method("simie", **{"base": "given", **other}).edit(golden, EDITS[1:])


GOES_ON = [("alphaedit", {}, True), ("memit", dict(hold_earlier=True), True), ("memit", {}, False)]


@pytest.mark.parametrize(("base", "more", "refused"), GOES_ON)
def test_a_base_that_goes_on_from_its_own_patches_needs_the_model_afresh(base, more, refused):
    lm, edits = make_lm(), [Edit("I know {}", subject="Lima", target_new="of")]
    quick = dict(layers=[1], steps=2, covariance_tokens=100, context_groups=[[2, 3]])
    settings = dict(base=base, base_settings=json.dumps(quick | more))
    assert method("simie", **settings).edit(lm, edits).deltas
    on = method("simie", **settings, afresh=False)
    if refused:
        with pytest.raises(InputError, match=f"afresh=False; {base} goes on from what its own patches keep"):
            on.edit(lm, edits)
    else:
        assert on.edit(lm, edits).deltas


def test_a_correction_is_said_to_be_none_and_a_merged_patch_is_refused(golden):
    simie = method("simie", base="given")
    first = simie.edit(golden, EDITS[:1])
    with golden.patched(first):
        second = simie.edit(golden, EDITS[1:2])
    with (
        golden.patched(merge([first, second])),
        pytest.raises(InputError, match="which was merged: apply the patches"),
    ):
        simie.edit(golden, EDITS[2:])
    lm = make_lm()
    edit = Edit("The capital of {} is", subject="Peru", target_new="Paris")
    quick = {"layer": 1, "steps": 3, "context_groups": [], "covariance_tokens": 0}
    simie = method("simie", base_settings=json.dumps(quick))
    with (
        lm.patched(simie.edit(lm, [edit])),
        pytest.warns(
            UserWarning, match=r"'The capital of Peru is' was to be 'Paris' in patch \w+.*take that patch off"
        ),
    ):
        simie.edit(lm, [replace(edit, target_new="Rome")])


def test_a_sequence_that_goes_on_in_another_layer_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path))
    lm, kept = make_lm(), {"steps": 3, "context_groups": [], "covariance_tokens": 0}
    edits = [Edit("The capital of {} is", subject=name, target_new="Paris") for name in ("Peru", "Chile")]
    first, same, other = (method("simie", base_settings=json.dumps(kept | {"layer": layer})) for layer in (1, 1, 0))
    with lm.patched(first.edit(lm, edits[:1])):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same.edit(lm, edits[1:])
        with pytest.raises(InputError, match="base_settings other"):
            other.edit(lm, edits[1:])
    keep_scores(lm, [LayerScore(1, 1.0, 1.0, 1.0, 1.0)])
    by_default = method("simie", base_settings=json.dumps(kept))
    with lm.patched(by_default.edit(lm, edits[:1])):
        keep_scores(lm, [LayerScore(0, 1.0, 1.0, 1.0, 1.0)])
        with pytest.warns(
            UserWarning, match=r"wrote in transformer.h.1.* have no part in what is solved in transformer.h.0"
        ):
            by_default.edit(lm, edits[1:])
