"""SERAC on real sentences against the authors' code (tests/golden/README.md)."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from test_golden import GOLDEN

from reknow import LM, SERAC, Case, Edit, Probe
from reknow.learning.editors import Editor, case_keys
from reknow.learning.training import Split, Training
from reknow.memories.serac.cases import Sample

pytestmark = pytest.mark.golden

ABOUT = json.loads((GOLDEN / "serac_texts.json").read_text(encoding="utf-8"))
TENSORS = load_file(GOLDEN / "serac_texts.safetensors")
EDITS = [Edit(prompt, target_new=answer) for prompt, answer in ABOUT["edits"]]
SETTINGS = dict(counterfactual=None, encoder=str(GOLDEN / "tiny_bert"), embedding_size=16, pooling_queries=1, rank=2)
"""Ours beside the paper's: a matrix on the encoder's first token, which one query finds, and a change of rank 2."""


def started() -> dict[str, torch.Tensor]:
    return {name.removeprefix("start/"): value for name, value in TENSORS.items() if name.startswith("start/")}


@pytest.fixture(scope="module")
def lm():
    return LM(GOLDEN / "tiny_gpt2_bytes", dtype=torch.float32)


@pytest.mark.parametrize("classifier", ["embedding", "cosine"])
def test_questions_go_where_the_authors_send_them(lm, classifier, tmp_path):
    """log p of every edit, the edit that is chosen, whether it answers, and the answer's probabilities."""
    settings = SETTINGS | dict(classifier=classifier, template=SERAC.paper("gpt2-xl").template)
    editor = Editor("serac", settings, started(), lm.fingerprint, case_keys([]))
    method = SERAC.paper("gpt2-xl", editor=str(editor.save(tmp_path / "editor.safetensors")), **settings)
    rows = ABOUT[classifier]
    questions = [row["question"] for row in rows]
    with lm.patched(method.edit(lm, EDITS)):
        memory = SERAC.running_memory(lm, lm.patches)
        chosen, log_p = memory.scopes(questions)
        assert chosen == [row["edit"] for row in rows]
        assert log_p == pytest.approx([max(row["log_p"]) for row in rows], rel=1e-4, abs=1e-5)
        for question, row in zip(questions, rows, strict=True):
            found = memory.modules.log_p([edit.text for edit in EDITS], [question] * len(EDITS))
            assert found.tolist() == pytest.approx(row["log_p"], rel=1e-4, abs=1e-5)
        assert [route is not None for route in memory.route(lm, questions)] == [row["in_scope"] for row in rows]
        for found, logits in zip(lm.likeliest(questions, 20), TENSORS[f"{classifier}/logits"], strict=True):
            wanted = logits.softmax(-1).topk(20).values.tolist()
            assert [probability for _, probability in found] == pytest.approx(wanted, rel=1e-4)


def test_training_takes_the_authors_steps(lm, monkeypatch):
    """The classifier's and the answer's loss, and what Adam makes of them, over three edits one after the other."""
    steps = ABOUT["steps"]
    asked = [(EDITS[step["edit"]], step["inside"]) for step in steps]
    cases = [Case(edit, (Probe(text, (edit.target_new,), "generalization", "p"),)) for edit, text in asked]
    method = SERAC.paper("gpt2-xl", learning_rate=ABOUT["rate"], **SETTINGS)
    learner = method.learner(lm, Split(cases, []), Training(steps=3, batch_size=1))
    learner.module.load_state_dict(started())
    monkeypatch.setattr(learner, "_states", learner.module.states)  # kept ones are in half precision
    optimizer = learner.optimizer()
    for case, step in zip(cases, steps, strict=True):
        sample = Sample([case.edit], [step["inside"]], [step["outside"]])
        monkeypatch.setattr(learner._train, "sample", lambda *_, sample=sample: sample)
        optimizer.zero_grad()
        loss, parts = learner.loss([case], random.Random(0))
        loss.backward()
        optimizer.step()
        assert parts == pytest.approx({"scope": step["scope"], "answer": step["answer"]}, rel=1e-4)
    for name, found in learner.module.state_dict().items():
        if name.startswith("scope.attention"):  # the first token has all of the weight
            assert torch.equal(found, TENSORS[f"start/{name}"])
        else:
            change = TENSORS[f"end/{name}"] - TENSORS[f"start/{name}"]
            error = found - TENSORS[f"end/{name}"]
            assert error.norm() <= 1e-4 * max(change.norm(), ABOUT["rate"]), name
