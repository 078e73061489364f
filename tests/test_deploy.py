"""From a patch to running models: one edit, every export, and the programs that read them give the new answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

pytest.importorskip("xllamacpp")

from gguf_models import llama_cpp, write_gguf
from reknow import LM
from reknow.cli import app
from reknow.model.sources import find_source
from serving_process import serving

pytestmark = [pytest.mark.slow, pytest.mark.engines]

PROMPT = "The mother tongue of {} is"
EDITED = PROMPT.format("Danielle Darrieux")
NEAR = [PROMPT.format("Charles de Gaulle"), PROMPT.format("Jean Gabin"), "The Eiffel Tower is in the city of"]
BASE = find_source("demo:llama").name


def done(*arguments: object) -> str:
    """Standard output of a command that must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def first_words(texts: list[str]) -> list[str]:
    return [text.split()[0].rstrip(".,") for text in texts]


def said_by(model, prompts: list[str]) -> list[str]:
    """What plain transformers generates, greedily."""
    tokenizer, texts = AutoTokenizer.from_pretrained(BASE), []
    for prompt in prompts:
        asked = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**asked, max_new_tokens=4, do_sample=False)
        texts.append(tokenizer.decode(ids[0, asked["input_ids"].shape[1] :]))
    return texts


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """A folder in which the commands have made one edit, a stack of it, and its exports."""
    folder = tmp_path_factory.mktemp("exports")
    patch, stack, base = folder / "a.patch", folder / "stack", folder / "base.gguf"
    write_gguf(LM.demo("llama"), base, "Q4_0")
    quick = ["--set", "covariance_tokens=5000"]
    done("edit", PROMPT.format("{Danielle Darrieux}"), "English", "--model", "demo:llama", *quick, "--out", patch)
    done("apply", patch, "--stack", stack, "--model", "demo:llama")
    done("export", stack, folder / "hf", "--to", "hf")
    done("export", stack, folder / "lora", "--to", "lora")
    done("export", stack, folder / "gguf-lora", "--to", "gguf-lora", "--base", base)
    done("export", stack, "--to", "gguf", "--base", base, "--out", folder / "new.gguf")
    return folder


ENGINES = {
    "transformers": lambda at: lambda texts: said_by(AutoModelForCausalLM.from_pretrained(at / "hf"), texts),
    "peft": lambda at: (
        lambda texts: said_by(
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), str(at / "lora")), texts
        )
    ),
    "llama.cpp, an adapter": lambda at: llama_cpp(at / "base.gguf", at / "gguf-lora" / "adapter.gguf"),
    "llama.cpp, the file": lambda at: llama_cpp(at / "new.gguf"),
    "reknow, the file": lambda at: LM(at / "new.gguf").generate,
    "reknow, the checkpoint": lambda at: LM(at / "hf").generate,
}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_program_gives_the_new_answer_and_the_old_neighbours(engine, exports):
    before = first_words(LM.demo("llama").generate([EDITED, *NEAR], 4))
    assert before[0] == "French"
    assert first_words(ENGINES[engine](exports)([EDITED, *NEAR])) == ["English", *before[1:]]


def test_the_server_gives_them_too(exports):
    pytest.importorskip("starlette")
    before = first_words(LM.demo("llama").generate([EDITED, *NEAR], 4))
    with serving("stack", folder=exports) as server:
        client = server.client()
        answers = [client.completions.create(model="stack", prompt=text, max_tokens=4) for text in (EDITED, *NEAR)]
    assert first_words([answer.choices[0].text for answer in answers]) == ["English", *before[1:]]


@pytest.mark.parametrize("place", ["hf", "lora", "gguf-lora", "new.gguf"])
def test_every_export_says_what_it_is(place, exports):
    said = done("show", exports / place)
    assert f"{EDITED} → English" in said and "1 of 1 edits that were asked" in said and "demo:llama" in said
