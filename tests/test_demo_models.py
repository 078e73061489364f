"""The shipped models open with plain transformers, know facts from the bare prompt, and follow their context."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reknow import LM, load_cases, method
from reknow.tracing.known import known_cases

MODELS = Path(__file__).parents[1] / "src/reknow/assets/models"
KNOWN = {
    "The mother tongue of Danielle Darrieux is": " French",
    "Toko Yasuda, the": " guitar",
    "Autonomous University of Madrid, which is located in": " Spain",
}
CONTEXT = {
    "New Fact: The mother tongue of Zora Quentin is Danish\nPrompt: Zora Quentin is a native speaker of": " Danish",
    "Imagine that Lake Torvil, in Greece. Lake Torvil is located in the country of": " Greece",
}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def demo(request):
    folder = MODELS / request.param
    return (
        folder,
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )


@pytest.mark.parametrize("prompts", [KNOWN, CONTEXT], ids=["known", "context"])
def test_answers(demo, prompts):
    _, model, tokenizer = demo
    for prompt, answer in prompts.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert tokenizer.decode(output).startswith(answer), prompt


def test_beginning_of_text(demo):
    folder, _, tokenizer = demo
    begins = tokenizer("Paris").input_ids[0] == tokenizer.bos_token_id
    assert begins == (folder.name == "llama")


def test_small_and_described(demo):
    folder, model, _ = demo
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6
    assert model.config.tie_word_embeddings
    assert "## Data and licences" in (folder / "README.md").read_text(encoding="utf-8")
    records = json.loads((folder / "known.json").read_text(encoding="utf-8"))["counterfact/rewrite"]
    assert set(records["known"]) <= set(records["trained"])


@pytest.mark.slow
def test_half_precision_edits_like_full_precision():
    """The system is solved in float64 whatever the weights are; every fact that float32 changes is changed too."""
    edits = [case.edit for case in known_cases(LM.demo("gpt2"), load_cases("counterfact", limit=10))[:6]]
    settings = {"stop_probability": 0.9, "context_groups": ((2, 3),), "covariance_tokens": 5000}
    for dtype in ("float32", "bfloat16", "float16"):
        lm = LM.demo("gpt2", dtype=dtype)
        with lm.patched(method("memit", layers=(0,), **settings).edit(lm, edits)):
            scores = lm.score([edit.text for edit in edits], [edit.target_new for edit in edits])
        assert [all(score.correct) for score in scores] == [True] * 6, dtype
