"""Where δ is measured and put: first tokens that are attention sinks, and models with a norm behind the MLP."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import AuthorsSearch, make_lm, our_names
from reknow import EMMET, LM, MEMIT, PMET, ROME, AlphaEdit, Edit, method
from reknow.editing.keys import Subjects
from reknow.editing.sinks import NEUTRAL, avoid_sinks, first_token_inputs, first_token_is_sink
from reknow.editing.solvers import rank_one
from reknow.editing.values import find_values
from reknow.model.tokens import EncodedText, Text

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "rome_sites.json").read_text())["cases"]
PARIS = Edit("{} is the capital of", subject="Paris", target_new="English")
OTHERS = [
    Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    Edit("{} is a native of", subject="Toko Yasuda", target_new="Paris"),
]
CONTEXTS = ("", "The city. ", "I saw the man in. ")


def golden_lm(model: str) -> LM:
    """A golden model; "sink" is tiny_gpt2 with a first position that outweighs every token."""
    lm = LM(GOLDEN / f"tiny_{'gpt2' if model == 'sink' else model}", dtype=torch.float32)
    if model == "sink":
        with torch.no_grad():
            lm.model.transformer.wpe.weight[0] *= 64
        lm = LM((lm.model, lm.tokenizer))
    return lm


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_the_search_gives_the_authors_vectors(case):
    """kmeng01/rome where its site or its subject is out of the common (tests/golden/README.md)."""
    lm = golden_lm(case["model"])
    tensors = load_file(GOLDEN / "rome_sites.safetensors")
    u, key = tensors[f"{case['name']}/keys"]
    value, delta, output, right = tensors[f"{case['name']}/values"]
    search = ROME.paper("gpt2-xl", **our_names(case["hparams"]))
    edit = Edit(case["prompt"], subject=case["subject"], target_new=case["target_new"])
    before = [template.removesuffix("{}") for template in case["templates"]]
    found = find_values(lm, [edit], case["layer"], ["", *before[1:]], search)
    theirs = sum(torch.tensor(case["losses"][name]) for name in ("nll", "kl", "weight_decay"))
    assert torch.allclose(torch.tensor(found.losses[0]), theirs, rtol=1e-4)
    pairs = [(found.value, value), (found.delta, delta), (found.value, output), (found.key, key)]
    for ours, wanted in pairs:
        assert (ours[0] - wanted).norm() <= 1e-3 * wanted.norm()
    direction = found.mean_key[0].double()
    assert (direction / direction.norm() - u).norm() <= 1e-4
    change = rank_one(direction, found.key[0].double(), found.delta[0].double()).dense()
    assert (change - torch.outer(right, u).double()).norm() <= 1e-3 * right.norm()


def test_a_sink_is_found_by_what_keys_say_of_their_tokens():
    assert first_token_is_sink(golden_lm("sink"))
    assert not first_token_is_sink(golden_lm("gpt2"))
    assert not first_token_is_sink(golden_lm("llama"))  # its first token is always the same one, and no subject's


@pytest.mark.parametrize(
    ("prompt", "subject", "stands_alone"),
    [
        ("{} is the capital of", "Paris", False),
        ("{}, London and Berlin are", "Paris", False),
        ("{} is a native of", "Toko Yasuda", True),  # its last token is not the first
        ("The capital of {} is", "Paris", True),
    ],
)
def test_only_a_subject_that_is_the_first_token_is_read_behind_other_text(prompt, subject, stands_alone):
    lm, edit = golden_lm("sink"), Edit(prompt, subject=subject, target_new="English")
    ((first, *others),) = avoid_sinks(lm, [edit], CONTEXTS)
    assert first == ("" if stands_alone else CONTEXTS[1])
    assert tuple(others) == CONTEXTS[1:]
    assert avoid_sinks(golden_lm("gpt2"), [edit], CONTEXTS) == [CONTEXTS]


def test_a_sink_has_a_prefix_even_where_there_are_no_contexts():
    assert avoid_sinks(golden_lm("sink"), [PARIS], [""]) == [[NEUTRAL]]


def test_keys_and_states_of_a_sink_are_those_behind_the_stand_in():
    lm = golden_lm("sink")
    subjects = Subjects(lm, [PARIS], CONTEXTS)
    (row,) = lm.encode([Text.of(PARIS.prompt, "Paris", prefix=CONTEXTS[1])])
    assert row.subject_last
    name = lm.parts.value[0]
    wanted = lm.read([row], [row.subject_last], inputs=[name], outputs=[name])
    assert torch.allclose(subjects.states(0, "value"), wanted.outputs[name].double(), atol=1e-5)
    (other,) = lm.encode([Text.of(PARIS.prompt, "Paris", prefix=CONTEXTS[2])])
    assert other.subject_last
    second = lm.read([other], [other.subject_last], inputs=[name]).inputs[name].double()
    mean = (3 * wanted.inputs[name].double() + second) / 4  # (stand-in + mean of both contexts) / 2
    assert torch.allclose(subjects.keys(0), mean, atol=1e-5)


METHODS = {
    "memit": MEMIT(layers=(0,), steps=6, covariance_tokens=3000),
    "emmet": EMMET(layer=0, steps=6, covariance_tokens=3000),
    "pmet": PMET(layers=(0,), steps=6, covariance_tokens=3000),
    "alphaedit": AlphaEdit(layers=(0,), steps=6, covariance_tokens=3000, null_share=0.5),
    "rome": ROME(layer=0, steps=6, covariance_tokens=3000),
}


@pytest.mark.parametrize("name", METHODS)
def test_one_sink_does_no_harm_to_the_batch(name):
    """A warning names the edit, and texts that begin with other tokens are read as they are without it."""
    lm, method = golden_lm("sink"), METHODS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without = method.edit(lm, OTHERS)
    with pytest.warns(UserWarning, match="'Paris' begins 'Paris is the capital of'"):
        together = method.edit(lm, [*OTHERS, PARIS])
    matrix = lm.parts.value[0]
    rows = [
        EncodedText(row.ids[:1], 1) for row in lm.encode([Text("English is"), Text("Berlin is"), Text("Because of")])
    ]

    def sinks() -> torch.Tensor:
        return lm.read(rows, [0] * len(rows), outputs=[matrix]).outputs[matrix]

    before, moved = sinks(), []
    for patch in (without, together):
        with lm.patched(patch):
            moved.append(float((sinks() - before).norm() / before.norm()))
    assert moved[1] < 2 * moved[0] + 0.01
    assert together.deltas[matrix].norm() < 1.5 * without.deltas[matrix].norm()


def test_the_step_and_the_bound_are_medians_over_the_contexts():
    """One context whose state is out of the common changes neither."""
    lm = golden_lm("sink")
    search = AuthorsSearch(steps=2, units="relative", learning_rate=0.1, site="block", weight_decay=0)
    edit = Edit("{} is a native of", subject="Toko Yasuda", target_new="Paris")
    found = find_values(lm, [edit], 0, CONTEXTS, search)
    lengths, block = [], lm.parts.blocks[0]
    for prefix in CONTEXTS:
        (row,) = lm.encode([Text.of(edit.prompt, "Toko Yasuda", prefix=prefix)])
        assert row.subject_last
        lengths.append(float(lm.read([row], [row.subject_last], outputs=[block]).outputs[block].norm()))
    unit = sorted(lengths)[1] / found.delta.shape[1] ** 0.5
    # One step of Adam moves every coordinate by the learning rate.
    assert found.delta[0].abs().median() == pytest.approx(0.1 * unit, rel=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "glm4", "granite"])
def test_the_step_has_the_unit_of_what_it_is_added_to(family):
    """Where an addition does not reach the block's output unchanged, the unit is half the value matrix's output."""
    lm = make_lm(family)
    assert not lm.parts.residual_identity
    lm.parts = replace(lm.parts, value_normed=False)  # the length of v + δ would be brought back to that of v
    edit = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")
    search = AuthorsSearch(steps=2, units="relative", learning_rate=0.1, weight_decay=0, clamp=100)
    found = find_values(lm, [edit], 1, [""], search)
    unit = float(found.value.norm()) / found.value.shape[1] ** 0.5 / 2
    assert found.delta[0].abs().median() == pytest.approx(0.1 * unit, rel=1e-3)


def test_what_matrices_get_at_the_first_token_is_read_where_it_is_the_same_in_all_texts():
    sink, llama = golden_lm("sink"), golden_lm("llama")
    assert first_token_inputs(golden_lm("gpt2"), golden_lm("gpt2").parts.value) == {}
    for lm in (sink, llama):
        name = lm.parts.value[-1]
        (row,) = lm.encode([Text("Berlin is the capital of")])
        found = first_token_inputs(lm, [name])[name]
        there = lm.read([row], [0], inputs=[name]).inputs[name].double()
        assert found.shape == there.shape
        # With a token of the tokenizer's own the state is one, else nearly one.
        assert (found - there).norm() <= (1e-6 if lm is llama else 0.5) * there.norm()


def how_unlikely(lm: LM) -> float:
    """Mean negative log-likelihood of the wanted answers."""
    scored = lm.score([edit.text for edit in OTHERS], [edit.target_new for edit in OTHERS])
    return sum(one.nll for one in scored) / len(scored)


@pytest.mark.parametrize("name", ["ultraedit", "stableedit"])
def test_a_gradients_change_leaves_the_first_token_alone(name):
    """Every matrix gives there what it gave, for first tokens that were not edited; the answers still come."""
    lm, tried = golden_lm("sink"), {"layers": (0, 1), "min_tokens": 2}
    if name == "stableedit":
        tried |= {"warm_up": None}
    rows = [EncodedText(row.ids[:1], 1) for row in lm.encode([Text("English is"), Text("Because of")])]
    names = [lm.parts.value[layer] for layer in (0, 1)]
    before, moved, losses = lm.read(rows, [0, 0], outputs=names).outputs, [], []
    for held in (True, False):
        with lm.patched(method(name, **tried, hold_first_token=held).edit(lm, OTHERS)):
            after = lm.read(rows, [0, 0], outputs=names).outputs
            losses.append(how_unlikely(lm))
        moved.append(max(float((after[n] - before[n]).norm() / before[n].norm()) for n in names))
    assert moved[0] < 0.2 * moved[1]
    assert max(losses) < how_unlikely(lm)
