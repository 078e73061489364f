"""MELO: a block of its own for every few edits."""

from __future__ import annotations

from conftest import make_lm
from reknow import MELO, Edit

PROMPTS = ["The capital of Peru is", "I know Danielle Darrieux", "Who is Zoë Übel ? She is"]


def edit(prompt: str, target: str = "of", **fields) -> Edit:
    return Edit(prompt, target_new=target, **fields)


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
