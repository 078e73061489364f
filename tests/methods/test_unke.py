"""UnKE and AnyEdit against the numbers of AnyEdit's authors (tests/golden/README.md), and what they promise."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from test_golden import GOLDEN, close

import reknow.editing.covariance
from conftest import make_lm
from families import tiny_model, tiny_tokenizer
from reknow import LM, MEMIT, AnyEdit, Edit, UnKE
from reknow.datasets.text import sample_text, text_source
from reknow.editing import triangle
from reknow.editing.by_expert import Diagonal
from reknow.editing.chunks import cut_answers, find_states, states_now
from reknow.editing.covariance import covariance
from reknow.editing.refined import Refined
from reknow.errors import ModelError, TextRefused
from reknow.evaluation.cost import estimate
from reknow.model.block_calls import BlockCalls
from reknow.model.hooks import added_at, output_edited
from reknow.model.tokens import EncodedText, Text

HEAD = json.loads((GOLDEN / "texts.json").read_text())
CASES = {case["name"]: case for case in HEAD["cases"]}
TENSORS = load_file(GOLDEN / "texts.safetensors")
COVARIANCES = {
    0: load_file(GOLDEN / "rome_gpt2.safetensors")["covariance/layer_0"],
    1: load_file(GOLDEN / "mass.safetensors")["covariance/layer_1"],
}


def golden(case):
    """The tiny model of the authors' run, with the texts that they preserved."""
    lm = LM(GOLDEN / f"tiny_{case['model']}", dtype=torch.float32)
    if "preserved" in case:
        key = ("contexts of text", ((len(case["preserved"]), 64),), text_source(None).digest, 0)
        lm.memo[key] = ("", *case["preserved"])
    return lm, [Edit(one["question"], target_new=one["answer"].strip()) for one in case["data"]]


def check_losses(ours, theirs, steps):
    """Theirs are those of all searches in a row, the one behind the last update included."""
    for number, losses in enumerate(ours):
        own = theirs[number * (steps + 1) : (number + 1) * (steps + 1)]
        assert losses == pytest.approx(own[: len(losses)], rel=1e-4) and len(losses) in (len(own), len(own) - 1)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["unke", "anyedit"])
def test_the_block_changes_as_the_authors_does(name):
    case = CASES[name]
    lm, edits = golden(case)
    hparams, settings = case["hparams"], {} if name == "unke" else {"chunk_tokens": case["hparams"]["window_size"]}
    method = UnKE.paper("llama-3-8b", layers=hparams["layers"], preserved_texts=2, end_token=False, **settings)
    patch = method.edit(lm, edits)
    check_losses(patch.notes["losses"], case["losses"], hparams["v_num_grad_steps"] - 1)
    assert patch.notes["errors"][0] == pytest.approx(case["errors"], rel=1e-4)
    assert patch.method == name
    for matrix, delta in patch.deltas.items():
        assert close(delta.dense(), TENSORS[f"{name}/{matrix}"], 1e-3), matrix
    assert {f"{name}/{matrix}" for matrix in patch.deltas} == {key for key in TENSORS if key.startswith(f"{name}/")}


@pytest.mark.golden
def test_the_matrices_change_as_the_authors_do(monkeypatch):
    case = CASES["anyedit-memit"]
    lm, edits = golden(case)
    monkeypatch.setattr("reknow.editing.covariance.covariance", lambda lm, layer, **_: COVARIANCES[layer])
    hparams = case["hparams"]
    method = AnyEdit.paper(
        "llama-3-8b",
        layers=hparams["layers"],
        chunk_tokens=hparams["window_size"],
        covariance_weight=hparams["mom2_update_weight"],
        end_token=False,
    )
    patch = method.edit(lm, edits)
    check_losses(patch.notes["losses"], case["losses"], hparams["v_num_grad_steps"] - 1)
    for layer, (_, delta) in enumerate(patch.deltas.items()):
        assert close(delta.dense(), TENSORS[f"anyedit-memit/layer_{layer}"], 1e-4)


QUESTION = Edit("Who is it", target_new="one of the old men in the town , and his name is known")


def test_a_text_longer_than_the_context_is_refused():
    lm, long = make_lm(), Edit("Who is it", target_new="Zoë " * 200)
    for method in (UnKE(), UnKE(chunk_tokens=5), AnyEdit()):
        with pytest.raises(TextRefused, match=r"^expected texts of at most 128 tokens.*got \d+: shorten them$"):
            method.edit(lm, [long])
    whole = len(lm.encode([Text.asked(QUESTION)])[0].ids)
    tight = make_lm(n_positions=whole)
    assert cut_answers(tight, [QUESTION], UnKE(end_token=False))[0].ends == (whole,)
    with pytest.raises(TextRefused, match=f"at most {whole} tokens"):  # the end token is one too many
        cut_answers(tight, [QUESTION], UnKE())


@pytest.mark.parametrize("editor", [UnKE(layers=(2,), steps=1), AnyEdit(layers=(2,), covariance_tokens=60)])
def test_a_state_in_the_last_layer_is_said_to_count_for_one_token(editor):
    lm, editor = make_lm(), replace(editor, search_steps=1)
    assert lm.layers == 3
    with pytest.warns(UserWarning, match=r"^layer 2 is the last, .* chunks have up to \d+: take"):
        editor.edit(lm, [QUESTION])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace(editor, chunk_tokens=1).edit(lm, [QUESTION])


def test_chunks_part_the_answer_and_states_stand_before_them():
    lm = make_lm()
    (text,) = cut_answers(lm, [QUESTION], UnKE(chunk_tokens=4))
    row = lm.encode([Text.asked(QUESTION)])[0]
    assert text.row.ids == (*row.ids, lm.tokenizer.eos_token_id)
    assert text.before[0] == row.prompt_length - 1 and text.ends[-1] == len(text.row.ids)
    assert [end - 1 for end in text.ends[:-1]] == list(text.before[1:])
    assert {b - a for a, b in pairwise(text.before)} == {4}


def test_states_make_the_model_say_the_chunks_to_the_loss_that_was_found(family):
    lm = make_lm(family)
    search = UnKE(chunk_tokens=4, search_steps=30, search_weight_decay=0.0)
    texts = cut_answers(lm, [QUESTION, Edit("It is in", target_new="the time of it")], search)
    z, losses = find_states(lm, texts, 1, search)
    added = z - states_now(lm, texts, lm.parts.blocks[1])
    first = len(texts[0].before)
    assert z.shape == (first + len(texts[1].before), lm.parts.hidden_size) and len(losses) == len(z)
    for text, deltas, courses in zip(
        texts, (added[:first], added[first:]), (losses[:first], losses[first:]), strict=True
    ):
        wide = torch.zeros(1, len(text.row.ids), lm.parts.hidden_size)
        for place, delta in zip(text.before, deltas, strict=True):
            wide[0, place] = delta
        batch = lm.pad([text.row])
        with output_edited(lm.model.get_submodule(lm.parts.blocks[1]), added_at(wide, 0)), torch.no_grad():
            log_probs = lm.forward(batch.ids, batch.mask, batch.positions, None).logits[0].log_softmax(-1)
        for place, end, course in zip(text.before, text.ends, courses, strict=True):
            said = fmean(-float(log_probs[i - 1, text.row.ids[i]]) for i in range(place + 1, end))
            assert said <= course[-1] + 0.05 < course[0], "the last update is behind the last loss"


def test_a_chunk_as_long_as_the_answer_is_the_answer():
    lm = make_lm()
    changes = dict(layers=(1,), steps=2, search_steps=2, preserved_texts=2)
    whole, chunk = UnKE(**changes).edit(lm, [QUESTION]), UnKE(**changes, chunk_tokens=99).edit(lm, [QUESTION])
    assert (whole.method, chunk.method) == ("unke", "anyedit")
    assert all(torch.equal(whole.deltas[name].dense(), chunk.deltas[name].dense()) for name in whole.deltas)
    attention = [name for name in whole.deltas if "attn" in name]
    assert attention and all(name.startswith(lm.parts.blocks[1]) for name in whole.deltas)


def test_other_texts_are_preserved(family):
    """The block moves less on them than where they do not count, whatever the edit wants."""
    lm, moved = make_lm(family), {}
    other = lm.encode([Text(text) for text in sample_text()[:4]])
    other = [EncodedText(row.ids[:40], 40) for row in other]
    (before,) = [call.output for call in BlockCalls(lm, other, 1).calls]
    for number in (1, 30):
        method = UnKE(layers=(1,), search_steps=10, preserved_texts=number, preserved_tokens=30 if number > 1 else 1)
        with lm.patched(method.edit(lm, [QUESTION])):
            (after,) = [call.output for call in BlockCalls(lm, other, 1).calls]
        moved[number] = float((after - before).norm())
    assert moved[30] < moved[1]


def test_what_is_written_meets_the_least_squares_with_the_other_tokens():
    """ΔW (λC + K_p K_pᵀ + K Kᵀ) = R Kᵀ, at one layer."""
    lm = make_lm()
    method = AnyEdit(layers=(1,), chunk_tokens=4, covariance_weight=3.0, covariance_tokens=400, search_steps=5)
    patch, texts = method.edit(lm, [QUESTION]), cut_answers(lm, [QUESTION], method)
    z, _ = find_states(lm, texts, 1, method)
    keys = lm.read([texts[0].row] * len(texts[0].row.ids), range(len(texts[0].row.ids)), inputs=[lm.parts.value[1]])
    states = keys.inputs[lm.parts.value[1]].double()  # (tokens, in)
    system = 3 * covariance(lm, 1, tokens=400).double() + states.T @ states
    right = (z - states_now(lm, texts, lm.parts.blocks[1])).T @ states[list(texts[0].before)]
    assert close((patch.deltas[lm.parts.value[1]].dense() @ system), right, 1e-4)


WRITING = dict(layers=(0, 1), chunk_tokens=4, covariance_tokens=400, search_steps=3)


def test_the_covariances_of_all_layers_are_read_in_one_pass(monkeypatch, tmp_path):
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path))
    read, own = [], reknow.editing.covariance.sum_keys
    monkeypatch.setattr(reknow.editing.covariance, "sum_keys", lambda task: read.append(task.names) or own(task))
    lm = make_lm()
    AnyEdit(**WRITING).edit(lm, [QUESTION])
    assert read == [list(lm.parts.value[:2])]
    MEMIT(covariance_tokens=400).whitening(lm, 0)
    assert sum(key[0] == "covariance" for key in lm.memo) == 2, "factors are those of other methods too"


def test_a_mixture_s_covariance_is_never_made_whole(monkeypatch):
    def whole(_covariance):
        raise AssertionError("it takes 17 GB in OLMoE")

    monkeypatch.setattr(Diagonal, "full", whole)
    lm = make_lm("olmoe")
    assert AnyEdit(**WRITING).edit(lm, [QUESTION]).deltas.keys() == set(lm.parts.value[:2])


def test_large_layers_are_solved_with_a_refined_factor(monkeypatch):
    lm, method = make_lm(), AnyEdit(**WRITING)
    small = method.edit(lm, [QUESTION])
    monkeypatch.setattr(triangle, "LARGE", 8)
    large = method.edit(lm, [QUESTION])
    assert any(isinstance(made, Refined) for made in lm.memo.values())
    assert all(close(delta.dense(), small.deltas[name].dense(), 1e-2) for name, delta in large.deltas.items())


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2", "bloom", "falcon", "opt", "phi"])
def test_a_chunk_run_alone_is_the_chunk_in_its_text(family, monkeypatch):
    """Windows, norms behind the MLP and positions in whatever form; and what memories or the model want whole."""
    lm = make_lm(family)
    search = UnKE(chunk_tokens=6, search_steps=3)
    texts = cut_answers(lm, [QUESTION], search)
    alone, losses = find_states(lm, texts, 1, search)
    monkeypatch.setattr(lm, "parts", replace(lm.parts, replayable=False))
    whole, others = find_states(lm, texts, 1, search)
    assert all(course == pytest.approx(other, rel=1e-4) for course, other in zip(losses, others, strict=True))
    others = "anyedit-memit or ft-uke" if lm.parts.residual_identity else "ft-uke"
    with pytest.raises(ModelError, match=rf"by themselves, since unke trains one; .* cannot: take {others}$"):
        UnKE().edit(lm, [QUESTION])
    if not lm.parts.residual_identity:
        with pytest.raises(ModelError, match=r"since anyedit-memit writes states .* between: take ft-uke$"):
            AnyEdit().edit(lm, [QUESTION])
    start = states_now(lm, texts, lm.parts.blocks[1])
    assert (alone - whole).norm() <= 1e-2 * (whole - start).norm()


@pytest.mark.parametrize(
    ("edited", "layers"),
    [
        (UnKE(search_steps=1, steps=1), (7,)),
        (AnyEdit(search_steps=1, covariance_tokens=200), (4, 5, 6, 7, 8)),
        (AnyEdit(search_steps=1, covariance_tokens=200, layers=(3, 2)), (2, 3)),
    ],
    ids=["unke", "anyedit-memit", "layers given"],
)
def test_an_estimate_names_the_layers_that_are_written(edited, layers):
    lm = LM((tiny_model("llama", num_hidden_layers=32), tiny_tokenizer()))
    edit = Edit("The mother tongue of Danielle Darrieux is", target_new="English")
    foreseen = estimate(lm, edited, [edit])
    assert (foreseen.layers, foreseen.guessed) == (layers, False)
    assert tuple(edited.edit(lm, [edit]).notes["layers"]) == layers
