"""SimIE: the authors' numbers, what it minimises, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from test_golden import GOLDEN, close

from conftest import make_lm
from reknow import LM, METHODS, Edit, Patch, method
from reknow.contract import Method, make_patch
from reknow.errors import InputError
from reknow.evaluation.cost import estimate
from reknow.patching.deltas import LowRank
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
    moved = sum(patch.deltas[name].dense() for patch in golden.patches)
    unit = float(golden.patches[0].state[f"unit.{name}"])
    assert float(golden.patches[1].state[f"unit.{name}"]) == unit, "λ stays what it was"
    with golden.unpatched():
        keys = [_keys(golden, edit, name) for edit in EDITS]
    pull = sum((moved - change) @ k.T @ k for change, k in zip(given, keys, strict=True))
    size = sum((change @ k.T @ k).norm() for change, k in zip(given, keys, strict=True))
    assert (pull + 0.5 * unit * moved).norm() < 1e-4 * size


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
