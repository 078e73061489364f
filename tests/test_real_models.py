"""Language models that others trained, opened by one name: tokens, texts, edits, undo, files, other processes.

SmolLM2-135M-Instruct and, where it is installed (`make gemma`), Gemma 3 270M. Both are converted once and kept with
pytest's own cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from reknow import LM, Edit, Patch, method
from reknow.model.fingerprint import weight_bits
from reknow.model.packaged import kept_folder
from reknow.patching.stack import save_stack

pytestmark = [pytest.mark.real, pytest.mark.slow]

EDIT = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English", target_true="French")
ASKED = EDIT.text
REPHRASED = "The native language of Danielle Darrieux is"
NEAR = ("The mother tongue of Charles de Gaulle is", "The mother tongue of Jean Gabin is")
FAR = ("The Eiffel Tower is in the city of", "The capital of Japan is", "The capital of Peru is")
TOKENS = 6
QUICK = dict(layer=3, covariance_tokens=5_000)


@pytest.fixture(scope="session")
def rome_patch(smollm2) -> Patch:
    return method("rome", **QUICK).edit(smollm2, [EDIT])


def said(lm: LM, *prompts: str) -> list[str]:
    return lm.generate(list(prompts), TOKENS)


def first_words(texts: list[str]) -> list[str]:
    return [text.split()[0].rstrip(".,") for text in texts]


# --- as they are -----------------------------------------------------------------------------------------------


def test_smollm2_is_opened_as_it_was_trained(smollm2):
    assert smollm2.name == "demo:smollm2" and smollm2.fingerprint.digest == "4bf165534b733221"
    assert smollm2.layers == 30 and smollm2.weight(smollm2.parts.value[0]).shape == (576, 1536)
    assert smollm2.parts.residual_identity and not smollm2.parts.value_normed and smollm2.parts.replayable
    assert said(smollm2, ASKED, *NEAR, *FAR) == [
        " French. She is a Canadian",
        " French, and the language of",
        " French.\n\nThe language",
        " Paris.\n\nThe E",
        " Tokyo.\n\nThe Japanese",
        " the capital of the country of",
    ]
    french, english = smollm2.score([ASKED] * 2, ["French", "English"])
    assert french.rank == 1 and french.nll == pytest.approx(1.663, abs=0.01) and english.nll > french.nll


def test_gemma3_is_opened_as_it_was_trained(gemma3):
    assert gemma3.name == "demo:gemma3" and gemma3.fingerprint.digest == "4b9fb4776e7dce0d"
    assert gemma3.layers == 18 and gemma3.weight(gemma3.parts.value[0]).shape == (640, 2048)
    assert not gemma3.parts.residual_identity and gemma3.parts.value_normed and gemma3.parts.replayable
    assert first_words(said(gemma3, ASKED, *NEAR, *FAR[:2])) == ["French"] * 3 + ["Paris", "Tokyo"]


HARD = [
    "naïve café — “quoted” ’s",
    "日本語のテキスト、한국어 그리고 русский",
    "🙂👩‍👩‍👧‍👦 flags 🇫🇷",
    "tabs\tand\r\nlines\n\n\nmore  blanks   ",
    " begins with a blank",
    "def f(x):\n    return x ** 2  # 3.14e-10",
    "مرحبا ١٢٣ שלום",
    "x" * 50 + "\u0301\u0000\ufffd",
]


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_texts_come_back_from_their_tokens(name, request):
    tokenizer = request.getfixturevalue(name).tokenizer
    for text in HARD:
        ids = tokenizer(text).input_ids
        assert (ids[0] == tokenizer.bos_token_id) == (name == "gemma3")
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    assert tokenizer.tokenize("in 2023")[-4:] == list("2023")


def test_the_special_tokens_and_the_chat_template_are_the_models(smollm2):
    tokenizer = smollm2.tokenizer
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2] and tokenizer("<|im_end|>").input_ids == [2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (names[1], names[2], names[2])
    chat = LM((smollm2.model, tokenizer), chat=True)
    assert "Paris" in chat.generate("What is the capital of France?", 12)
    with pytest.warns(UserWarning, match="demo:smollm2 is a chat model"):
        smollm2.generate("What is the capital of France?", 1)


# --- edited ----------------------------------------------------------------------------------------------------

EDITS: dict[str, dict[str, Any]] = {"rome": QUICK, "ft-m": dict(layer=3), "grace": dict(layer=12)}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_the_fact_and_comes_off_bit_for_bit(name, smollm2):
    bits, before = weight_bits(smollm2.model), said(smollm2, ASKED, REPHRASED, *NEAR, *FAR)
    patch = method(name, **EDITS[name]).edit(smollm2, [EDIT])
    assert weight_bits(smollm2.model) == bits
    smollm2.apply(patch)
    try:
        after = said(smollm2, ASKED, REPHRASED, *NEAR, *FAR)
        changed = {key for key, value in weight_bits(smollm2.model).items() if value != bits[key]}
    finally:
        smollm2.revert(patch)
    assert first_words(before[:4]) == ["French"] * 4 and first_words(after[:2]) == ["English"] * 2
    assert after[4:] == before[4:]  # word for word
    if name == "rome":
        assert after[2:] == before[2:]
    if name == "ft-m":
        assert first_words(after[2:4]) == ["French"] * 2
    assert changed == (set() if name == "grace" else {f"{smollm2.parts.value[3]}.weight"})
    assert weight_bits(smollm2.model) == bits and said(smollm2, ASKED, REPHRASED, *NEAR, *FAR) == before


def test_rome_edits_gemma3_which_has_norms_behind_its_matrices(gemma3):
    bits, before = weight_bits(gemma3.model), said(gemma3, ASKED, *NEAR, *FAR)
    with gemma3.patched(method("rome", **QUICK).edit(gemma3, [EDIT])):
        after = said(gemma3, ASKED, *NEAR, *FAR)
    assert first_words(after[:3]) == ["English", "French", "French"]
    assert after[3:] == before[3:]
    assert weight_bits(gemma3.model) == bits


# --- files and programs ------------------------------------------------------------------------------------------


def run(*arguments: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "reknow", *map(str, arguments)]
    result = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return result


def test_a_patch_made_here_is_applied_by_another_process(smollm2, rome_patch, tmp_path):
    rome_patch.save(tmp_path / "a.patch")
    assert (tmp_path / "a.patch").stat().st_size < 30_000
    shown = run("apply", tmp_path / "a.patch", "--stack", tmp_path / "stack", "--model", "demo:smollm2").stdout
    assert "demo:smollm2 with 1 patch" in shown
    with smollm2.patched(rome_patch):
        here = said(smollm2, ASKED, REPHRASED, *NEAR)
    assert said(LM(tmp_path / "stack"), ASKED, REPHRASED, *NEAR) == here


def test_a_patch_made_by_another_process_is_applied_here(smollm2, rome_patch, tmp_path):
    settings = [word for name, value in QUICK.items() if name != "layer" for word in ("--set", f"{name}={value}")]
    prompt = ASKED.replace(EDIT.subject, f"{{{EDIT.subject}}}")
    out = tmp_path / "b.patch"
    line = ["edit", prompt, "English", "--model", "demo:smollm2", "--layer", QUICK["layer"], "--out", out]
    shown = run(*line, *settings)
    assert "the new answer comes first in 1 of 1 prompts" in shown.stdout
    assert "every bit as before" in shown.stdout and "chat template" not in shown.stderr
    with smollm2.patched(Patch.load(out)):
        assert first_words(said(smollm2, ASKED, REPHRASED)) == ["English"] * 2
    stack = save_stack(tmp_path / "stack", smollm2.name, [Patch.load(out)])
    assert len(LM(stack).patches) == 1


def test_the_demo_runs_on_it(smollm2, tmp_path):
    shown = run("demo", "--quick", "--model", "demo:smollm2", "--out", tmp_path / "run").stdout
    assert "demo:smollm2: 30 layers, 134,515,008 parameters\nIt knows 13 of 300 facts of CounterFact." in shown
    (fact,) = [line.split("…")[1].split() for line in shown.splitlines() if line.startswith(" the fact")]
    assert fact.count("French.") == 1 and "English." in fact
    assert "Taken back one by one: all 274 tensors have the bits they had before." in shown
    rows = [json.loads(line) for line in (tmp_path / "run" / "cases.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"rome", "ft-m"} and all(row["error"] is None for row in rows)


def test_the_conversion_made_anew_is_the_one_that_was_kept(smollm2, monkeypatch, tmp_path):
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path))
    assert weight_bits(LM.demo("smollm2").model) == weight_bits(smollm2.model)
    for file in kept_folder("smollm2").iterdir():
        file.unlink()  # half a gigabyte
