"""MEMOIR: the authors' numbers, and what it answers through its memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_lm
from reknow import LM, MEMOIR, Edit
from reknow.errors import InputError
from reknow.memories.distances import prompt_inputs
from reknow.memories.residual_memory import TopHash, mean_inputs
from reknow.methods import memoir
from reknow.model.tokens import Text

GOLDEN = Path(__file__).parent.parent / "golden"
QUICK = dict(layer=1, steps=30, context_groups=((1, 3),))
PROMPTS = ["The capital of Peru is", "I know Danielle Darrieux", "Where is the Eiffel Tower ?"]


def edit(prompt: str, target: str = "of") -> Edit:
    return Edit(prompt, target_new=target)


@pytest.mark.golden
def test_the_memory_is_the_authors(monkeypatch):
    """Masks, losses and W_m of two edits in sequence, and the answers through it.

    Their mean over an answer counts the prompt's last token too, as a loss of nothing: of a one-token answer it is
    half of ours, so a gradient that is not shortened is too.
    """
    lm = LM(GOLDEN / "tiny_llama", dtype=torch.float32)
    about, theirs = json.loads((GOLDEN / "memoir.json").read_text()), load_file(GOLDEN / "memoir.safetensors")
    monkeypatch.setattr(memoir, "general_contexts", lambda *_, **__: tuple(about["contexts"]))
    module = lm.parts.value[about["layer"]]
    seen = [mean_inputs(*prompt_inputs(lm, lm.encode([Text(t)]), module)) for t in about["unrelated"]]
    background = torch.cat(seen).mean(0)
    assert torch.allclose(background, theirs["background"], atol=1e-5)
    monkeypatch.setattr(MEMOIR, "_background", lambda *_: background)
    method = MEMOIR(
        layer=about["layer"], top_k=about["top_k"], steps=about["steps"], stop_loss=0.0, seed=about["seed"],
        threshold=about["threshold"], units="absolute", learning_rate=about["learning_rate"] / 2, longest_gradient=2,
    )  # fmt: skip
    for number, one in enumerate(about["edits"]):
        assert one["answer_tokens"] == 1
        lm.apply(method.edit(lm, [edit(one["prompt"], one["target_new"])]))
        ours = MEMOIR.running_memory(lm, lm.patches)
        assert torch.equal(ours.stored, theirs["masks"][: number + 1].bool())
        assert lm.patches[-1].notes["losses"][0] == pytest.approx([2 * loss for loss in one["losses"]], rel=2e-4)
        memory = theirs[f"memory_{number}"]
        assert float((ours.weight - memory).norm() / memory.norm()) < 2e-4  # their weight decay is left out
    assert max(one["norms"][0] for one in about["edits"]) > 1 > min(one["norms"][0] for one in about["edits"])
    rows = lm.encode([Text(one["prompt"]) for one in about["asked"]])
    logits = [lm.model(torch.tensor([row.ids])).logits[0, -1] for row in rows]
    assert torch.allclose(torch.stack(logits), theirs["logits"], atol=2e-3)
    with lm.unpatched():
        plain = [lm.model(torch.tensor([row.ids])).logits[0, -1] for row in rows]
    same = [torch.equal(a, b) for a, b in zip(logits, plain, strict=True)]
    assert same == [one["match"] is None for one in about["asked"]] and any(same) and not all(same)


def test_edits_open_the_memory_and_other_prompts_do_not():
    lm = make_lm()
    plain = lm.generate(PROMPTS, 4)
    method = MEMOIR(**QUICK, threshold=0.9)
    for prompt in PROMPTS[:2]:
        lm.apply(method.edit(lm, [edit(prompt)]))
    assert all(score.correct[0] for score in lm.score(PROMPTS[:2], ["of", "of"]))
    assert lm.generate(PROMPTS[2:], 4) == plain[2:]
    lm.revert(lm.patches[1])
    assert lm.generate(PROMPTS[1:], 4) == plain[1:], "its mask went with it"
    assert lm.score(PROMPTS[:1], ["of"])[0].correct == (True,)
    lm.revert(lm.patches[0])
    assert lm.generate(PROMPTS, 4) == plain


def test_a_threshold_of_zero_lets_every_prompt_in():
    lm = make_lm()
    lm.apply(MEMOIR(**QUICK, threshold=0.0).edit(lm, [edit(PROMPTS[0])]))
    memory = MEMOIR.running_memory(lm, lm.patches)
    inputs = torch.randn(3, 2, memory.weight.shape[1]).to(memory.weight.device)
    inside = torch.ones(3, 2, dtype=torch.bool, device=inputs.device)
    opened = memory.opened(memory.hash.masks(inputs, inside))
    assert torch.equal(opened, memory.stored.expand(3, -1))


def test_edits_one_by_one_are_those_of_one_call():
    lm, method = make_lm(), MEMOIR(**QUICK)
    edits = [edit(PROMPTS[0]), edit(PROMPTS[1], "in"), edit("Who is Zoë Übel")]
    batch = method.edit(lm, edits)
    for one in edits:
        lm.apply(method.edit(lm, [one]))
    a, b = MEMOIR.running_memory(lm, [batch]), MEMOIR.running_memory(lm, lm.patches)
    assert torch.equal(a.stored, b.stored) and torch.allclose(a.weight, b.weight, atol=1e-4)


def test_an_edit_made_anew_says_the_new_answer():
    """The same prompt has the same columns, which go on from what they had learned."""
    lm, method = make_lm(), MEMOIR(**QUICK)
    lm.apply(method.edit(lm, [edit(PROMPTS[0], "of")]))
    lm.apply(method.edit(lm, [edit(PROMPTS[0], "in")]))
    assert lm.score(PROMPTS[:1], ["in"])[0].correct == (True,)
    assert lm.patches[1].notes["conflicts"] == [{"prompt": PROMPTS[0], "old": "of", "new": "in"}]


def test_masks_of_one_memory_are_made_alike():
    lm = make_lm()
    lm.apply(MEMOIR(**QUICK | dict(steps=2), top_k=20).edit(lm, [edit(PROMPTS[0])]))
    with pytest.raises(InputError, match="expected the top_k that the memory was begun with; got 30: set it to 20"):
        MEMOIR(**QUICK, top_k=30).edit(lm, [edit(PROMPTS[1])])
    with pytest.raises(InputError, match="expected the seed that the memory was begun with; got 5: set it to 0"):
        MEMOIR(**QUICK, seed=5).edit(lm, [edit(PROMPTS[1])])
    later = MEMOIR(**QUICK | dict(steps=2), background_facts=3).edit(lm, [edit(PROMPTS[1])])
    assert later.memory["top_k"] == 20
    assert torch.equal(later.state["background"], lm.patches[0].state["background"])


def test_more_columns_than_there_are_cannot_be_kept():
    lm = make_lm()
    width = lm.weight(lm.parts.value[1]).shape[1]
    with pytest.raises(
        InputError, match=f"expected top_k of at most the {width} inputs of the matrix; got 999: lower"
    ):
        MEMOIR(**QUICK, top_k=999).edit(lm, [edit(PROMPTS[0])])
    assert MEMOIR(**QUICK | dict(steps=1)).edit(lm, [edit(PROMPTS[0])]).memory["top_k"] == round(width * 4096 / 14336)


def test_like_prompts_have_like_masks():
    """Of two questions about one subject more columns are shared than with a question about another."""
    lm, method = make_lm(), MEMOIR(**QUICK)
    hash_ = method._hash(lm, 1, [])
    assert isinstance(hash_, TopHash)
    texts = ["The capital of Peru is", "What is the capital of Peru ? It is", "I know Danielle Darrieux"]
    masks = hash_.masks(*prompt_inputs(lm, lm.encode([Text(t) for t in texts]), lm.parts.value[1]))
    assert (masks[0] & masks[1]).sum() > (masks[0] & masks[2]).sum()
