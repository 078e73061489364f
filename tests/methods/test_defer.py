"""DEFER: the gate and the map beside a matrix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import make_lm
from reknow import DEFER, LM, Edit
from reknow.memories.distances import prompt_states
from reknow.methods.defer import Gate
from reknow.model.tokens import Text

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.golden
def test_defer_is_adam_on_whole_matrices():
    """u, sign(x) and one number are what the authors' loop makes of two full linear maps."""
    lm = LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)
    wanted = json.loads((GOLDEN / "defer.json").read_text())
    method = DEFER.paper("gpt2-xl", layer=0, steps=len(wanted[0]["losses"]))
    for case in wanted:
        patch = method.edit(lm, [Edit(case["prompt"], target_new=case["target_new"])])
        assert patch.notes["losses"][0] == pytest.approx(case["losses"], rel=2e-3)
        lm.apply(patch)
    gate = DEFER.running_memory(lm, lm.patches)
    (row,) = lm.encode([Text(wanted[0]["prompt"])])
    inputs, _ = prompt_states(lm, [row], gate.module)
    value, logit = gate.read(inputs)
    assert float(logit) == pytest.approx(wanted[-1]["logit"], rel=1e-2)
    assert torch.allclose(value[0], torch.tensor(wanted[-1]["value"]), rtol=1e-2, atol=1e-2)


def test_a_gate_starts_like_a_linear_map():
    lm = make_lm()
    module = lm.parts.value[1]
    gate, (out, width) = Gate.new(lm, module, 0.5, 0), lm.weight(module).shape
    inputs, linear = torch.randn(4, width), nn.Linear(width, out)
    value, logit = gate.read(inputs)
    linear.weight.data, linear.bias.data = gate.map[:, :-1], gate.map[:, -1]
    assert torch.allclose(value, linear(inputs), atol=1e-6) and logit.shape == (4,)
    assert float(gate.map.abs().max()) <= width**-0.5
