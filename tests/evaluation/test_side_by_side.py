"""Texts of several edited models that are written together are those that each writes by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import make_lm
from reknow import FT, LM, ROME, evaluate, load_cases
from reknow.edits import Case
from reknow.evaluation import probing, run_loops
from reknow.evaluation.plan import Plan
from reknow.evaluation.probing import read_cases
from reknow.evaluation.side_by_side import sample_side_by_side
from reknow.patching.deltas import Dense
from reknow.patching.patches import Patch

pytestmark = pytest.mark.usefixtures("short_texts")
SEARCH = ROME(layer=1, steps=4, context_groups=((2, 4),), covariance_tokens=0)


@pytest.fixture(scope="module")
def demo() -> LM:
    return LM.demo("gpt2")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Four, each with three of its ten texts to write."""

    def shorter(case: Case) -> Case:
        texts = [probe for probe in case.probes if probe.kind == "fluency"][:3]
        return replace(case, probes=(*(probe for probe in case.probes if probe.kind != "fluency"), *texts))

    found = [shorter(case) for case in load_cases("counterfact", limit=12) if case.edit.subject]
    return [case for case in found if any(p.kind == "fluency" for p in case.questions)][:4]


def texts_alone(lm: LM, case: Case, patch: Patch, seed: int = 0) -> list[str | None]:
    with lm.patched(patch):
        (readings,) = read_cases(lm, [case], generate=False, seed=seed)
    return [one.text for one in readings if one.kind == "fluency"]


@pytest.mark.slow
def test_texts_written_together_are_those_of_each(demo, cases):
    """With factors and with whole matrices, of other layers too, and with a patch below all of them."""
    patches = [SEARCH.edit(demo, [cases[0].edit]), replace(SEARCH, layer=2).edit(demo, [cases[1].edit])]
    patches += [FT(layer=(0, 1), steps=2).edit(demo, [case.edit]) for case in cases[2:]]
    assert {type(delta).__name__ for patch in patches for delta in patch.deltas.values()} == {"LowRank", "Dense"}
    below = FT(layer=3, steps=2).edit(demo, [cases[0].edit])
    for seed, stack in ((0, []), (3, [below])):
        with demo.patched(*stack):
            found = sample_side_by_side(demo, cases, patches, seed)
            assert found == [texts_alone(demo, *both, seed) for both in zip(cases, patches, strict=True)]
        assert len({text for own in found for text in own or []}) > len(cases)
    assert not any(module._forward_hooks for module in demo.model.modules())


@pytest.mark.slow
def test_a_run_writes_the_texts_of_its_cases_together(demo, cases, monkeypatch):
    plan = Plan(generate=False, fluency=True)
    with monkeypatch.context() as alone:
        alone.setattr(run_loops, "sample_side_by_side", lambda lm, cases, patches, seed: [None] * len(cases))
        wanted = evaluate(demo, cases, FT(layer=1, steps=3), plan)
    calls = []
    own = run_loops.sample_side_by_side

    def together(lm, some, *rest):
        calls.append(len(some))
        return own(lm, some, *rest)

    monkeypatch.setattr(run_loops, "sample_side_by_side", together)
    found = evaluate(demo, cases, FT(layer=1, steps=3), plan)
    assert calls == [len(cases)]
    for mine, other in zip(found.rows.values(), wanted.rows.values(), strict=True):
        texts = [one["text"] for one in mine["readings"] if one["kind"] == "fluency"]
        assert texts == [one["text"] for one in other["readings"] if one["kind"] == "fluency"] and all(texts)


def test_what_cannot_be_an_addition_is_written_by_itself(demo, cases, monkeypatch):
    """Rounded weights, texts longer than the model has positions for, and a model that an edit has wrecked."""
    monkeypatch.setattr(probing, "SAMPLED_TOKENS", 100)
    for lm in (make_lm("gpt2", dtype=torch.bfloat16), make_lm("gpt2", n_positions=99)):
        patches = [FT(layer=1, steps=1).edit(lm, [case.edit]) for case in cases]
        assert sample_side_by_side(lm, cases, patches, 0) == [None] * len(cases)
    name = demo.parts.value[1]
    patches = [FT(layer=1, steps=1).edit(demo, [case.edit]) for case in cases[:2]]
    wrecked = replace(patches[0], deltas={name: Dense(torch.full_like(demo.weight(name), 1e35))})
    assert sample_side_by_side(demo, cases[:2], [wrecked, patches[1]], 0) == [None, None]
    assert not any(texts_alone(demo, cases[0], wrecked)), "by itself it says nothing"
