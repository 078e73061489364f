"""Memories put on in another process: what was saved is all they need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_contract import EDIT, OTHER, quick

from conftest import make_lm
from reknow import LM, METHODS, Edit
from reknow.memories.base import MemoryMethod

NAMES = [name for name, entry in METHODS.items() if issubclass(entry.method, MemoryMethod)]
PROMPTS = [EDIT.text, OTHER.text, "The capital of Peru is", "The capital of Chile is"]
TARGETS = ["of", "in France", "Lima", "Lima"]
THERE = """
import json, sys, torch
from reknow import LM, Patch
torch.set_num_threads(1)
asked = json.load(sys.stdin)
lm = LM(asked["model"])
for files in asked["patches"]:
    with lm.patched(*map(Patch.load, files)):
        scores = lm.score(asked["prompts"], asked["targets"])
        said = lm.generate(asked["prompts"], 5)
        print(json.dumps([said, [list(s.top) for s in scores], [s.nll for s in scores]]))
"""


@pytest.mark.slow
def test_memories_answer_the_same_in_another_process(tmp_path):
    """Each of two versions, in the order of the edits; texts and tokens are the same, losses to the last digits."""
    made = make_lm("llama")
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    lm = LM(tmp_path / "model")
    files, here = [], []
    for name in NAMES:
        method, patches = quick(name, lm), []
        for i, edits in enumerate(([EDIT, OTHER], [Edit("The capital of {} is", subject="Peru", target_new="Lima")])):
            with lm.patched(*patches):
                patches.append(method.edit(lm, edits))
            patches[-1].save(tmp_path / f"{name}-{i}.patch")
        with lm.patched(*patches):
            scores = lm.score(PROMPTS, TARGETS)
            here.append([lm.generate(PROMPTS, 5), [list(s.top) for s in scores], [s.nll for s in scores]])
        files.append([str(tmp_path / f"{name}-{i}.patch") for i in range(2)])
    asked = {"model": str(tmp_path / "model"), "patches": files, "prompts": PROMPTS, "targets": TARGETS}
    ran = subprocess.run(
        [sys.executable, "-c", THERE], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    for name, line, (said, top, nll) in zip(NAMES, ran.stdout.splitlines(), here, strict=True):
        said_there, top_there, nll_there = json.loads(line)
        assert (said_there, top_there) == (said, top), name
        # The last bit of a sum depends on where in memory a tensor lies.
        assert nll_there == pytest.approx(nll, rel=1e-5), name
