"""The likeliest next tokens: what a softmax over the logits behind the prompt says, by whom the memories name."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import make_lm, some_patch
from reknow import LM, Edit, method
from reknow.model.tokens import Text

PROMPTS = ["The capital of France is", "Peru"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_they_are_those_of_a_pass_of_its_own(family):
    lm = make_lm(family)
    for prompt, found in zip(PROMPTS, lm.likeliest(PROMPTS, 3), strict=True):
        (row,) = lm.encode([Text(prompt)])
        with torch.no_grad():
            logits = lm.model(torch.tensor([row.ids])).logits[0, -1].float()
        chances, tokens = logits.softmax(-1).topk(3)
        assert [text for text, _ in found] == [lm.tokenizer.decode([token]) for token in tokens.tolist()]
        assert [p for _, p in found] == pytest.approx(chances.tolist(), abs=1e-6)


def test_more_than_there_are_is_all_and_sums_to_one():
    lm = make_lm("gpt2")
    (found,) = lm.likeliest(PROMPTS[:1], 10**6)
    assert len(found) == lm.model.config.vocab_size and math.isclose(sum(p for _, p in found), 1, abs_tol=1e-5)


def test_a_wrecked_model_has_none():
    lm = make_lm("gpt2")
    with lm.patched(some_patch(lm, size=1e30)):
        assert lm.likeliest(PROMPTS) == [[], []]
    assert all(len(found) == 5 for found in lm.likeliest(PROMPTS))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ike-zero", "grace", "serac"])
def test_memories_answer_as_they_do_when_they_write(name):
    lm = LM.demo("gpt2")
    edit = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")
    with lm.patched(method(name).edit(lm, [edit])):
        (found,) = lm.likeliest([edit.text])
        assert found[0][0].strip() and lm.generate(edit.text, 1).strip() == found[0][0].strip()
    assert found != lm.likeliest([edit.text])[0]
