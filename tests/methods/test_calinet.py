"""CaliNet: slots beside an MLP, and the assessment of what a model knows."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_lm
from reknow import LM, CaliNet, Edit
from reknow.errors import InputError
from reknow.memories.distances import prompt_states
from reknow.memories.slots import Slots, merge
from reknow.methods.calinet import assess_knowledge, other_inputs
from reknow.model.tokens import Text

PROMPTS = ["The capital of Peru is", "I know Danielle Darrieux", "Who is Zoë Übel ? She is"]


def edit(prompt: str, target: str = "of", **fields) -> Edit:
    return Edit(prompt, target_new=target, **fields)


def test_slots_without_trained_keys_are_refused():
    with pytest.raises(InputError, match="expected slots with trained_keys; got 5 slots"):
        CaliNet(slots=5).edit(make_lm(), [edit(PROMPTS[0])])


@pytest.mark.golden
def test_slots_learn_as_the_authors_layer_does():
    """Losses of every step of Adam, keys and values behind them, what the slots add, and the logits."""
    golden = Path(__file__).parent.parent / "golden"
    about, theirs = json.loads((golden / "calinet.json").read_text()), load_file(golden / "calinet.safetensors")
    folder = golden / "tiny_gpt2"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, activation_function="relu")  # as T5
    lm = LM((model, AutoTokenizer.from_pretrained(folder)))
    (first, answer), (reworded, _), (second, other) = about["rows"]
    edits = [Edit(first, target_new=answer, rephrasings=(reworded,)), Edit(second, target_new=other)]
    own = dict(layer=0, slots=about["slots"], steps=len(about["losses"]) - 1, learning_rate=about["rate"])
    patch = CaliNet.paper(**own).edit(lm, edits)
    assert patch.notes["losses"] == pytest.approx([fmean(losses) for losses in about["losses"][:-1]], rel=1e-5)
    for name in ("keys", "values"):
        assert (patch.state[name] - theirs[name]).norm() <= 1e-4 * theirs[name].norm()
    rows = lm.encode([Text(prompt) for prompt in about["prompts"]])
    _, before = prompt_states(lm, rows, lm.parts.value[0])
    with lm.patched(patch):
        _, after = prompt_states(lm, rows, lm.parts.value[0])
        assert torch.allclose(after - before, theirs["slots"], rtol=1e-4, atol=1e-4)
        for row, wanted in zip(rows, theirs["logits"], strict=True):
            assert (lm.model(torch.tensor([row.ids])).logits[0, -1] - wanted).norm() <= 1e-4 * wanted.norm()


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


@pytest.mark.slow
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
