"""Keys at the subject's last token."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from conftest import make_lm
from reknow import LM, Patch, method
from reknow.editing.keys import Subjects
from reknow.edits import Edit
from reknow.model.hooks import added_at, output_edited, recorded
from reknow.model.tokens import Text
from reknow.patching.patches import merge

EDITS = [
    Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English", target_true="French"),
    Edit("{} is a city in", subject="Lima", target_new="Italy", target_true="Peru"),
    Edit("The famous player {}", subject="Toko Yasuda", target_new="piano", target_true="guitar"),
]
CONTEXTS = ("", "The city. ", "I saw. ")


def test_keys_are_half_bare_prompt_and_half_prefixed():
    gpt2 = make_lm()
    bare, one, two = (Subjects(gpt2, EDITS, [context]).keys(1) for context in CONTEXTS)
    assert torch.allclose(Subjects(gpt2, EDITS, CONTEXTS).keys(1), bare / 2 + one / 4 + two / 4, atol=1e-6)


REWORDED = replace(EDITS[0], rephrasings=("{} spoke the language", "The native language of Danielle Darrieux is"))


def test_rephrasings_are_read_as_other_prompts_are():
    gpt2 = make_lm()
    asked = [Edit(text, subject="Danielle Darrieux", target_new="English") for text in REWORDED.rephrasings]
    bare, one, two = (Subjects(gpt2, [edit], [""]).keys(1)[0] for edit in (REWORDED, *asked))
    found = Subjects(gpt2, [EDITS[1], REWORDED], [""], rephrased=True)
    assert torch.allclose(found.keys(1)[1], bare / 2 + one / 4 + two / 4, atol=1e-6)
    assert torch.allclose(found.keys(1)[0], Subjects(gpt2, EDITS[1:2], [""]).keys(1)[0], atol=1e-6)
    assert torch.allclose(
        found.states(1, "block"), Subjects(gpt2, [EDITS[1], REWORDED], [""]).states(1, "block"), atol=1e-5
    )


@pytest.mark.parametrize("site", ["block", "value"])
def test_states_carried_forward_are_those_of_the_model_with_the_addition(site):
    """A bias at the first layer's value matrix, seen at the subject's last token, which ends the text here."""
    gpt2 = make_lm()
    edits = [replace(edit, prompt="I know {}") for edit in EDITS]
    subjects, delta = Subjects(gpt2, edits, CONTEXTS), torch.randn(3, gpt2.parts.hidden_size)
    first, second = subjects.carried_forward(delta, (0, 2), site)
    before = [subjects.states(layer, site) for layer in (0, 2)]
    assert torch.allclose(first, before[0] + delta.double(), atol=1e-4)
    rows = gpt2.encode([Text.about(edit) for edit in edits])
    for i, row in enumerate(rows):
        ids = torch.tensor([row.ids[: row.subject_last + 1]])
        with output_edited(
            gpt2.model.get_submodule(gpt2.parts.value[0]), added_at(delta[i : i + 1], row.subject_last)
        ):
            name = gpt2.parts.blocks[2] if site == "block" else gpt2.parts.value[2]
            with recorded(gpt2.model, outputs=[name]) as (_, seen):
                gpt2.model(ids)
        assert torch.allclose(second[i], seen[name][0, row.subject_last].double(), atol=1e-4)


HOLDING = {
    "memit": dict(hold_earlier=True),
    "pmet": dict(hold_earlier=True),
    "alphaedit": {},
    "betaedit": {},
    "evoedit": {},
    "sphere": {},
}
QUICK = dict(layers=(0,), context_groups=(), covariance_tokens=1000, steps=3)


def edited(lm: LM, name: str, edits: list[Edit], **changes) -> Patch:
    """The patch, made without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return method(name, **QUICK | HOLDING[name] | changes).edit(lm, edits)


@pytest.mark.parametrize("name", HOLDING)
def test_an_edit_with_a_key_that_is_held_is_said_to_be_none(name):
    """The same question with another answer, and another question that begins alike; not the edit itself again."""
    lm = make_lm()
    with lm.patched(edited(lm, name, EDITS[:2])):
        edited(lm, name, EDITS[:1] + EDITS[2:])
        for other in (replace(EDITS[0], target_new="German"), replace(EDITS[1], prompt="{} lies in")):
            wanted = (
                rf"^{name} holds what .* '{other.text}' has the key of '(The mother|Lima is).*take rome, which holds"
            )
            with pytest.warns(UserWarning, match=wanted):
                method(name, **QUICK | HOLDING[name]).edit(lm, [other])


@pytest.mark.parametrize("name", ["memit", "alphaedit", "evoedit"])
def test_what_is_not_held_any_more_is_said(name):
    lm = make_lm()
    one = edited(lm, name, EDITS[:1])
    with lm.patched(one):
        two = edited(lm, name, EDITS[1:2])
        with pytest.warns(
            UserWarning, match=r"wrote in transformer.h.0.* is not held in transformer.h.1.*set layers"
        ):
            method(name, **QUICK | HOLDING[name] | dict(layers=(1,))).edit(lm, EDITS[2:])
    with lm.patched(merge([one, two])), pytest.warns(UserWarning, match="keeps no keys, since it was merged"):
        method(name, **QUICK | HOLDING[name]).edit(lm, EDITS[2:])
