"""GRACE: the authors' numbers, and the rules of the codebook."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_lm
from reknow import GRACE, LM, Edit
from reknow.errors import EditRefused, InputError
from reknow.model.tokens import Text

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "grace.json").read_text())["cases"]
REPLACEMENT = {"replace_prompt": "before", "replace_last": "last", "replace_all": "prompt"}
OTHERWISE = {
    "authors": dict(site="value"),
    "easyedit": dict(site="value", source="easyedit"),
    "prompt": dict(site="value", replacement="prompt"),
    "c_fc": {},
}
"""By case: what is not as the authors published it for GPT-2 XL."""


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_grace_gives_the_authors_codebook(case):
    """One edit after the other: losses of every step, keys, radii, values, and the logits of the edited model."""
    lm = LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)
    tensors = load_file(GOLDEN / "grace.safetensors")
    for number, wanted in enumerate(case["edits"]):
        settings = dict(layer=0, epsilon=4, steps=12, seed=number) | OTHERWISE[case["name"]]
        method = GRACE.paper("gpt2-xl", **settings)
        assert method.replacement == REPLACEMENT[case["replacement"]] and method.learning_rate == case["lr"]
        lm.apply(method.edit(lm, [Edit(wanted["prompt"], target_new=wanted["target_new"])]))
        patch = lm.patches[-1]
        assert patch.notes["slots"] == [wanted["slot"]] and patch.notes["keys"] == wanted["keys"]
        assert patch.notes["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
        assert GRACE.running_memory(lm, lm.patches).book.radii.tolist() == pytest.approx(wanted["radii"], rel=1e-4)
    book = GRACE.running_memory(lm, lm.patches).book
    for name, found in (("keys", book.keys), ("values", book.values)):
        wanted = tensors[f"{case['name']}/{name}"]
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    prompts = lm.encode([Text(prompt) for prompt in case["prompts"]])
    for row, wanted in zip(prompts, tensors[f"{case['name']}/logits"], strict=True):
        assert (lm.model(torch.tensor([row.ids])).logits[0, -1] - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_first_matrix_of_an_mlp_can_have_the_codebook_where_there_is_one(family):
    lm, method = make_lm(family), GRACE(layer=2, site="mlp_in", steps=80)
    one = edit("The capital of Peru is")
    if family == "llama":
        with pytest.raises(InputError, match=r"expected an MLP with one first matrix for site mlp_in; got .*up_proj"):
            method.edit(lm, [one])
        return
    other = lm.score(["Who is Zoë Übel"], ["in"])
    lm.apply(method.edit(lm, [one]))
    (module,) = lm.patches[-1].memory["modules"]
    assert module in lm.parts.mlp_in[2] and lm.score([one.text], [one.target_new])[0].correct == (True,)
    assert lm.score(["Who is Zoë Übel"], ["in"]) == other
    with pytest.raises(InputError, match="change layer or site"):
        GRACE(layer=2).edit(lm, [edit("Who is Zoë Übel")])


@pytest.mark.parametrize("layer, prompt", [(2, "The capital of Peru is"), (1, "P")])
def test_a_replacement_that_no_answer_sees_is_refused(layer, prompt):
    """In the last layer what stands before the last token changes no answer; a prompt of one token has none."""
    lm = make_lm()
    assert lm.layers == 3 and lm.encode([Text("P")])[0].prompt_length == 1
    with pytest.raises(EditRefused, match=f"got layer {layer} for '{prompt}': set replacement to prompt"):
        GRACE(layer=layer, replacement="before").edit(lm, [edit(prompt)])
    GRACE(layer=layer, replacement="prompt", steps=2).edit(lm, [edit(prompt)])


def edit(prompt: str, target: str = "of") -> Edit:
    return Edit(prompt, target_new=target)


def radii(lm: LM) -> list[float]:
    return GRACE.running_memory(lm, lm.patches).book.radii.tolist()


def test_far_keys_are_added_and_equal_answers_widen_a_radius():
    lm, method = make_lm(), GRACE(layer=1, epsilon=1.0, units="absolute", steps=2)
    lm.apply(method.edit(lm, [edit("The capital of Peru is"), edit("I know Danielle Darrieux", "in")]))
    assert radii(lm) == [1.0, 1.0]
    keys = GRACE.running_memory(lm, lm.patches).book.keys
    far = float((keys[0] - keys[1]).norm())
    wide = GRACE(layer=1, epsilon=far, units="absolute", steps=2)
    lm.apply(wide.edit(lm, [edit("The capital of Chile is")]))
    assert len(radii(lm)) == 2 and radii(lm)[0] > 1.0, "same answer: the nearest key covers both"
    assert lm.patches[-1].state["slots"].tolist() == [0], "a version has what its edits changed, and no more"


def test_other_answers_share_the_room_between_two_keys():
    lm, method = make_lm(), GRACE(layer=1, epsilon=50.0, units="absolute", steps=2)
    lm.apply(method.edit(lm, [edit("The capital of Peru is")]))
    lm.apply(method.edit(lm, [edit("The capital of Chile is", "in")]))
    book = GRACE.running_memory(lm, lm.patches).book
    gap = float((book.keys[0] - book.keys[1]).norm())
    assert book.radii.tolist() == pytest.approx([gap / 2 - 1e-5, gap / 2])


@pytest.mark.parametrize("together", [True, False])
def test_a_prompt_that_is_stored_with_another_answer(together):
    lm = make_lm()
    method = GRACE(layer=2, steps=60)
    first = [edit("The capital of Peru is", "of"), edit("Who is Zoë Übel", "in")]
    lm.apply(method.edit(lm, first))
    before = lm.generate("Who is Zoë Übel", 3)
    assert before.startswith(" in")
    more = [edit("Beats Music is", "of")] if together else []
    update = method.edit(lm, [edit("The capital of Peru is", "in"), *more])
    assert update.notes["conflicts"] == [{"prompt": "The capital of Peru is", "old": "of", "new": "in"}]
    lm.apply(update)
    assert lm.score(["The capital of Peru is"], ["in"])[0].correct == (True,)
    assert lm.generate("Who is Zoë Übel", 3) == before
    lm.revert(update)
    assert lm.score(["The capital of Peru is"], ["of"])[0].correct == (True,)


def test_edits_together_are_edits_one_by_one():
    """Values are learned side by side; each as if it were alone."""
    lm, method = make_lm(), GRACE(layer=2, steps=20)
    edits = [edit("The capital of Peru is"), edit("I know", "in France"), edit("Who is Zoë Übel", "English")]
    batch = method.edit(lm, edits)
    for one in edits:
        lm.apply(method.edit(lm, [one]))
    a, b = GRACE.running_memory(lm, [batch]).book, GRACE.running_memory(lm, lm.patches).book
    assert torch.allclose(a.keys, b.keys, atol=1e-4) and torch.allclose(a.values, b.values, atol=1e-2)
    assert a.answers == b.answers


def test_a_value_stands_where_the_papers_put_it_or_nowhere():
    with pytest.raises(InputError, match=r"expected replacement as one of .*: correct it"):
        GRACE(replacement="all")  # type: ignore[arg-type]


def test_a_prompt_for_which_a_key_was_widened_is_inside_whatever_the_rounding():
    lm = make_lm()
    method = GRACE(layer=2, steps=60)
    lm.apply(method.edit(lm, [edit("The capital of Peru is", "of"), edit("Who is Zoë Übel", "of")]))
    assert len(lm.patches[0].state["slots"]) == 1
    ids = torch.tensor([lm.encode([Text("Who is Zoë Übel")])[0].ids], device=lm.device)
    plain = lm.model(ids).logits[0, -1].argmax()  # transformers' own activation function, not the fused one
    assert lm.generate("Who is Zoë Übel", 1) == lm.tokenizer.decode([plain]) == " of"
