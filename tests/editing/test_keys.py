"""Keys at the subject's last token."""

from __future__ import annotations

import torch

from conftest import make_lm
from reknow.editing.keys import Subjects
from reknow.edits import Edit

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
