"""DEFER, MELO and CaliNet: what each adds beside the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import make_lm
from reknow import DEFER, LM, MELO, CaliNet, Edit
from reknow.datasets import load_facts
from reknow.errors import InputError
from reknow.memories.codebook import Clusters
from reknow.memories.distances import distance_scale, prompt_states
from reknow.memories.slots import Slots, merge
from reknow.methods.calinet import assess_knowledge, other_inputs
from reknow.methods.defer import Gate
from reknow.model.tokens import Text

GOLDEN = Path(__file__).parent.parent / "golden"
PROMPTS = ["The capital of Peru is", "I know Danielle Darrieux", "Who is Zoë Übel ? She is"]


def edit(prompt: str, target: str = "of", **fields) -> Edit:
    return Edit(prompt, target_new=target, **fields)


def test_defer_is_adam_on_whole_matrices():
    """u, sign(x) and one number are what the authors' loop makes of two full linear maps."""
    lm = LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)
    wanted = json.loads((GOLDEN / "defer.json").read_text())
    method = DEFER.paper("gpt2-xl", layer=0, steps=len(wanted[0]["losses"]))
    for case in wanted:
        patch = method.edit(lm, [edit(case["prompt"], case["target_new"])])
        assert patch.notes["losses"][0] == pytest.approx(case["losses"], rel=2e-3)
        lm.apply(patch)
    gate = DEFER.memory(lm, lm.patches)
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


def test_clusters_join_split_and_forget():
    table = Clusters()
    a, b = (1,), (2,)
    table.insert(torch.tensor([0.0, 0.0]), a, 0, radius=1.0, scale=1.0)
    table.insert(torch.tensor([1.8, 0.0]), a, 1, radius=1.0, scale=1.0)
    (one,) = table.clusters
    assert one.centre.tolist() == pytest.approx([0.9, 0]) and one.radius == 1.0 and len(one.members) == 2
    table.insert(torch.tensor([9.0, 0.0]), a, 2, radius=1.0, scale=1.0)
    assert len(table.clusters) == 2
    table.insert(torch.tensor([0.9, 1.0]), b, 3, radius=1.0, scale=1.0)
    split, other = table.clusters[0], table.clusters[2]
    assert split.radius == pytest.approx(0.5, abs=1e-4) and other.radius == pytest.approx(0.5, abs=1e-4)
    assert split.members == [], "both of its keys lie 0.9 from the centre, and are forgotten"
    table.insert(torch.tensor([0.9, 1.0]), a, 4, radius=1.0, scale=1.0)
    assert other is not table.clusters[2] and table.clusters[2].answer == a and table.clusters[2].members[0][1] == 4


@pytest.mark.slow
def test_distances_are_in_units_of_questions_alike():
    lm = make_lm()
    alike = [fact.text for fact in load_facts("pararel") if fact.prompt == load_facts("pararel")[0].prompt][:8]
    rows = lm.encode([Text(text) for text in alike])
    keys, _ = prompt_states(lm, rows, lm.parts.value[1])
    unit = distance_scale(lm, 1)
    assert 0 < unit < 10 * float(torch.cdist(keys, keys).max())
    with lm.patched(DEFER(layer=0, steps=2).edit(lm, [edit(PROMPTS[0])])):
        lm.memo.clear()
        assert distance_scale(lm, 1) == unit, "of the base model, whatever is applied"


def test_melo_has_a_block_for_every_few_edits():
    lm = make_lm()
    method = MELO(layer=1, block_size=2, rank=3)
    patch = method.edit(lm, [edit(prompt) for prompt in PROMPTS])
    assert patch.memory["blocks"] == [0, 0, 1] and patch.memory["modules"] == list(lm.parts.value[1:3])
    assert patch.state[f"down.{lm.parts.value[1]}"].shape == (2, 3, 128)
    with lm.patched(patch):
        assert all(score.correct[0] for score in lm.score(PROMPTS, ["of"] * 3))
        more = method.edit(lm, [edit("Beats Music is", "in")])
        assert more.memory["blocks"] == [2]
    with pytest.raises(InputError, match="where the memory is"), lm.patched(patch):
        MELO(layer=0).edit(lm, [edit("Beats Music is")])


def test_slots_add_to_the_mlp_what_the_equation_says():
    lm = make_lm()
    patch = CaliNet(layer=1, trained_keys=True, slots=5, steps=3).edit(lm, [edit(PROMPTS[0])])
    assert patch.state["keys"].shape == (5, 32) == patch.state["values"].shape
    (row,) = lm.encode([Text(PROMPTS[0])])
    mlp_input, _ = prompt_states(lm, [row], lm.parts.mlp_in[1][0])
    _, before = prompt_states(lm, [row], lm.parts.value[1])
    with lm.patched(patch):
        _, after = prompt_states(lm, [row], lm.parts.value[1])
    hidden = nn.functional.gelu(mlp_input @ patch.state["keys"].T, approximate="tanh")  # GPT-2's own
    assert torch.allclose(after, before + hidden @ patch.state["values"], atol=1e-4)


def test_slots_learn_all_paraphrases_and_stand_beside_earlier_ones():
    lm = make_lm()
    reworded = edit("The capital of {} is", subject="Peru", rephrasings=("{} has the capital",))
    lm.apply(CaliNet(layer=1).edit(lm, [reworded]))
    assert [s.correct for s in lm.score(["The capital of Peru is", "Peru has the capital"], ["of"] * 2)] == [
        (True,)
    ] * 2
    lm.apply(CaliNet(layer=2).edit(lm, [edit("Who is Zoë Übel", "in")]))
    assert lm.score(["Who is Zoë Übel"], ["in"])[0].correct == (True,)
    lm.apply(CaliNet(layer=2).edit(lm, [edit("Beats Music is", "of")]))
    slots = merge([Slots.read(lm, patch) for patch in lm.patches])
    assert [len(one.keys) for one in slots] == [2, 2], "those beside one MLP run as one"


def test_a_slot_answers_to_its_own_fact_more_than_to_others():
    lm = make_lm()
    patch = CaliNet(layer=1).edit(lm, [edit(PROMPTS[0])])
    (row,) = lm.encode([Text(PROMPTS[0])])
    mlp_in = lm.parts.mlp_in[1][0]
    own, _ = prompt_states(lm, [row], mlp_in)
    others = other_inputs(lm, 1)
    assert float(own @ patch.state["keys"].T) == pytest.approx(3, abs=1e-3)
    assert float((others @ patch.state["keys"].T).square().mean()) < 1


def test_the_assessment_rises_when_a_fact_is_learned():
    lm = make_lm()
    one = edit("The capital of {} is", subject="Peru")
    patch = CaliNet(layer=1).edit(lm, [one])
    before = assess_knowledge(lm, one, "of", 1e-3)
    assert patch.notes["assessment"] == [[before]] and assess_knowledge(lm, edit("I know"), "of", 1e-3) is None
    with lm.patched(patch):
        assert assess_knowledge(lm, one, "of", 1e-3) > before
