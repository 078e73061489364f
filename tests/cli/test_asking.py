"""`reknow ask`: what it prints is what the model says, with its patches and without."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from conftest import saved, some_patch
from pseudo_terminal import at_a_terminal
from reknow import GRACE, LM, Edit
from reknow.cli.app import app
from reknow.display import visible
from reknow.patching.stack import save_stack
from reknow.registry import make

PROMPTS = ["The mother tongue of Danielle Darrieux is", "The capital of Peru is"]
EDIT = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")
pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("model"), "gpt2")


@pytest.fixture
def base(model) -> LM:
    return LM(model)


@pytest.fixture
def patch(base):
    """One that changes what the model says."""
    patch = some_patch(base, size=30.0)
    patch.save("a.patch")
    return patch


def ask(*arguments: object, prompts: str | bytes | None = None):
    return CliRunner().invoke(app, ["ask", *map(str, arguments)], input=prompts)


def said(*arguments: object, prompts: str | bytes | None = None) -> str:
    result = ask(*arguments, prompts=prompts)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object, prompts: str | bytes | None = None) -> str:
    result = ask(*arguments, prompts=prompts)
    assert result.exit_code == 2 and result.stderr.startswith("error: expected ") and not result.stdout
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def test_it_says_what_the_model_says_with_a_patch_a_stack_and_without(model, base, patch):
    before = base.generate(PROMPTS[0], 8)
    with base.patched(patch):
        after = base.generate(PROMPTS[0], 8)
    assert before.strip() != after.strip()
    save_stack("mine", model, [patch])
    assert said(PROMPTS[0], "--model", model, "--tokens", 8) == before.strip() + "\n"
    assert said(PROMPTS[0], "--model", model, "--patch", "a.patch", "--tokens", 8).strip() == after.strip()
    assert said(PROMPTS[0], "--stack", "mine", "--tokens", 8).strip() == after.strip()
    found = json.loads(said(PROMPTS[0], "--stack", "mine", "--tokens", 8, "--beside", "--json"))
    assert found["answers"] == [{"prompt": PROMPTS[0], "answer": after, "before": before}]
    assert found["patches"] == [patch.id] and found["model"] == model


@pytest.mark.parametrize("method", ["grace", "ike-zero"])
def test_memories_answer_too(method, model, base):
    made = GRACE(layer=1, steps=20) if method == "grace" else make(method, {})
    memory = made.edit(base, [EDIT])
    memory.save("memory.patch")
    with base.patched(memory):
        wanted = base.generate(PROMPTS[0], 6)
    assert wanted != base.generate(PROMPTS[0], 6)
    found = json.loads(said(PROMPTS[0], "--model", model, "--patch", "memory.patch", "--tokens", 6, "--json"))
    assert found["answers"][0]["answer"] == wanted
    assert said(PROMPTS[0], "--model", model, "--patch", "memory.patch", "--tokens", 6) == wanted.strip() + "\n"


def test_prompts_come_one_a_line(model, base):
    both = base.generate(PROMPTS, 5)
    shown = "".join(f"{prompt} … {text.strip()}\n" for prompt, text in zip(PROMPTS, both, strict=True))
    assert said("--model", model, "--tokens", 5, prompts="\n\n".join(PROMPTS)) == shown
    assert said(*PROMPTS, "--model", model, "--tokens", 5) == shown


def test_before_and_after_stand_side_by_side(model, base, patch):
    shown = said(*PROMPTS, "--model", model, "--patch", "a.patch", "--tokens", 2, "--beside")
    head, *rows = shown.splitlines()
    assert head.split() == ["prompt", "before", "after"] and len(rows) >= 2
    assert base.generate(PROMPTS[0], 2).strip() in shown


def test_drawn_answers_depend_on_the_seed_alone(model):
    draw = "--model", model, "--tokens", 8, "--temperature", 3
    first = said(PROMPTS[0], *draw, "--seed", 1)
    assert first == said(PROMPTS[0], *draw, "--seed", 1) != said(PROMPTS[0], *draw, "--seed", 2)


def test_what_is_refused(model, base, patch, tmp_path):
    assert "standard input" in refused("--model", model, prompts="\n \n")
    assert "UTF-8" in refused("--model", model, prompts=b"caf\xe9\n")
    assert "--stack or --patch" in refused("x", "--model", model, "--beside")
    assert "reknow apply" in refused("x", "--stack", "nowhere")
    assert "--model" in refused("x", "--stack", "nowhere", "--model", model)
    assert "none.patch" in refused("x", "--model", model, "--patch", "none.patch")
    other = saved(tmp_path / "other", "llama")
    assert "patch" in refused("x", "--model", other, "--patch", "a.patch")
    assert "--top-k" in refused("x", "--model", model, "--top-k", 3)
    assert "tokens" in refused("a " * 500, "--model", model)


def test_braces_of_an_edit_are_warned_of(model):
    result = ask("The mother tongue of {Danielle Darrieux} is", '{"a": 1}', "--model", model, "--tokens", 2)
    (warning,) = result.stderr.splitlines()
    assert result.exit_code == 0 and warning.startswith("warning: the braces of “The mother tongue of {Danielle")


def test_a_chat_model_asked_outside_its_template_says_so(tmp_path):
    lm = LM(saved(tmp_path / "chatty", "llama"))
    lm.tokenizer.chat_template = "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}<assistant>"
    lm.tokenizer.save_pretrained(tmp_path / "chatty")
    question = "Where is the Eiffel Tower?"
    result = ask(question, "--model", tmp_path / "chatty", "--tokens", 4)
    assert result.exit_code == 0 and "--chat" in result.stderr
    result = ask(question, "--model", tmp_path / "chatty", "--tokens", 4, "--chat")
    assert result.stdout == visible(LM(str(tmp_path / "chatty"), chat=True).generate(question, 4).strip()) + "\n"
    assert not result.stderr


@pytest.mark.slow
def test_at_a_terminal_ctrl_c_stops_one_answer_and_the_next_is_given(model, base):
    first, second = (visible(base.generate(prompt, 60).strip()) for prompt in PROMPTS)
    with at_a_terminal("ask", *PROMPTS, "--model", model, "--tokens", 60, pass_seconds=0.05) as session:
        session.wait_for(" … .+")
        session.press_ctrl_c()
        assert session.wait_for("stopped: the answer ends here")
        assert session.end() == 130
    assert f"{PROMPTS[1]} … {second}" in session.seen and first not in session.seen


@pytest.mark.slow
def test_ctrl_c_before_an_answer_ends_the_command(model):
    with at_a_terminal("ask", *PROMPTS, "--model", model, pass_seconds=1.5) as session:
        session.wait_for(" … ")
        session.press_ctrl_c()
        assert session.end() == 130
    assert "stopped: interrupted" in session.seen and PROMPTS[1] not in session.seen
