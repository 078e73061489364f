"""Keys at the subject's last token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import make_lm
from reknow.editing.keys import Subjects
from reknow.edits import Edit
from reknow.model.hooks import added_at, output_edited, recorded
from reknow.model.tokens import Text

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
