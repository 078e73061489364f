"""In-Context Editing against the authors' script, with the same samples (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reknow import ICE, LM, Edit
from reknow.editing import self_distillation

pytestmark = pytest.mark.golden

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "ice.json").read_text())["cases"]}


CHANGED = {
    "paper": dict(variant="paper"),
    "static_no_context": dict(variant="paper", targets="static", with_context=False),
}


@pytest.fixture(scope="module")
def models():
    return {name: LM(GOLDEN / f"tiny_{name}", dtype=torch.float32) for name in ("gpt2", "llama")}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_the_authors(models, name, monkeypatch):
    case, lm = CASES[name], models[CASES[name]["model"]]
    given, sources = iter(case["samples"]), []

    def sample(_lm, rows, count, **_):
        sources.append([list(row.ids) for row in rows])
        return [tuple(tokens) for tokens in next(given)]

    monkeypatch.setattr(self_distillation, "sample", sample)
    method = ICE.paper(
        "gpt2-xl",
        layers=case["layers"],
        steps=case["num_steps"],
        learning_rate=case["lr"],
        clamp=case["norm_constraint"],
        samples=case["num_return_sequences"],
        context_introductions=[case["lead_in"]],
        **CHANGED.get(name, {}),
    )
    request = case["request"]
    edit = Edit(
        request["prompt"],
        subject=request["subject"],
        target_new=request["target_new"],
        context=tuple(request["context"]),
    )
    patch = method.edit(lm, [edit])

    assert sources[0] == case["sampled_behind"] * case["num_return_sequences"]
    assert patch.notes["losses"] == pytest.approx(case["losses"], rel=1e-5)
    tensors = load_file(GOLDEN / "ice.safetensors")
    assert set(patch.deltas) == set(case["delta_norm"])
    for matrix, delta in patch.deltas.items():
        ours, theirs = delta.dense(), tensors[f"{name}/{matrix}"].double()
        assert float(ours.norm()) == pytest.approx(case["delta_norm"][matrix], rel=1e-4)
        assert float((ours[: len(theirs)] - theirs).norm() / theirs.norm()) < 1e-4
