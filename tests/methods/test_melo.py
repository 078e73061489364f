"""MELO: a block of its own for every few edits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_lm
from reknow import LM, MELO, Edit
from reknow.model.tokens import Text

GOLDEN = Path(__file__).parent.parent / "golden"

PROMPTS = ["The capital of Peru is", "I know Danielle Darrieux", "Who is Zoë Übel ? She is"]


def edit(prompt: str, target: str = "of", **fields) -> Edit:
    return Edit(prompt, target_new=target, **fields)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


@pytest.mark.golden
def test_melo_gives_the_authors_blocks_and_clusters():
    """Call after call: losses of every step, both factors of each block, and the clusters, which are joined, split
    and cut; then the block that each prompt takes, and the edited model's logits."""
    about, theirs = json.loads((GOLDEN / "melo.json").read_text()), load_file(GOLDEN / "melo.safetensors")
    lm = LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)
    rate = about["rate"] * about["blocks"] ** 0.5  # each factor is scaled by that root
    settings = {name: about[name] for name in ("rank", "radius", "steps")}
    method = MELO.paper("gpt2-xl", layer=0, learning_rate=rate, stop_loss=0, **settings)
    for number, call in enumerate(about["calls"]):
        lm.apply(method.edit(lm, [Edit(prompt, target_new=answer) for prompt, answer in call["edits"]]))
        patch = lm.patches[-1]
        assert patch.notes["losses"][0] == pytest.approx(call["losses"], rel=1e-4)
        for i, module in enumerate(lm.parts.value):
            assert close(patch.state[f"up.{module}"][0], theirs[f"block_{number}/up.{i}"])
            # Inputs near 0 have gradients near Adam's ε, which counts for more in factors that are not scaled.
            assert close(patch.state[f"down.{module}"][0], theirs[f"block_{number}/down.{i}"], 1e-2)
        clusters = MELO.running_memory(lm, lm.patches).table.clusters
        assert [[block for _, block in each.members] for each in clusters] == [c["blocks"] for c in call["clusters"]]
        radii = [cluster["radius"] for cluster in call["clusters"]]
        assert [each.radius for each in clusters] == pytest.approx(radii, rel=1e-5)
    memory = MELO.running_memory(lm, lm.patches)
    assert close(torch.stack([each.centre for each in memory.table.clusters]), theirs["centres"])
    rows = lm.encode([Text(prompt) for prompt in about["prompts"]])
    keys = lm.read(rows, [len(row.ids) - 1 for row in rows], inputs=[lm.parts.value[0]]).inputs[lm.parts.value[0]]
    assert [memory.table.find(key) for key in keys] == about["chosen"]
    for row, wanted in zip(rows, theirs["logits"], strict=True):
        assert close(lm.model(torch.tensor([row.ids])).logits[0, -1], wanted)


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
