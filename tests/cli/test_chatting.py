"""`reknow chat`: a conversation in the chat template, at a real terminal and from a pipe."""

from __future__ import annotations

import time

import pytest
from typer.testing import CliRunner

from conftest import saved, some_patch
from pseudo_terminal import at_a_terminal
from reknow import GRACE, LM, Chat, Edit
from reknow.cli.app import app
from reknow.display import visible
from reknow.model.chat import Message
from reknow.patching.stack import save_stack

TEMPLATE = (
    "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
FIRST, SECOND = "Who owns Beats Music?", "Where is the Eiffel Tower?"
pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = saved(tmp_path_factory.mktemp("model"), "llama")
    lm = LM(folder)
    lm.tokenizer.chat_template = TEMPLATE
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def stack(model):
    """A stack of two patches that change what the model says, and the model."""
    lm = LM(model)
    patches = [some_patch(lm, seed, size=30.0) for seed in (1, 2)]
    save_stack("mine", model, patches)
    return lm, patches


def answers(lm: LM, *questions: str, tokens: int = 6, **chat) -> list[str]:
    """What the model says to the questions of one conversation."""
    said: list[Message] = []
    for question in questions:
        lm.chat = Chat(history=tuple(said), **chat)
        said += [Message("user", question), Message("assistant", lm.generate(question, tokens).strip())]
    return [message.content for message in said[1::2]]


def chat(*arguments: object, lines: list[str]):
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], input="\n".join(lines))


def test_an_answer_knows_what_was_said(model):
    wanted = answers(LM(model), FIRST, SECOND, FIRST)
    (alone,) = answers(LM(model), SECOND)
    assert wanted[0] != wanted[2] and wanted[1] != alone
    result = chat("--model", model, "--tokens", 6, lines=[FIRST, "", SECOND, FIRST, "/new", SECOND, "/quit", "no"])
    assert result.exit_code == 0 and not result.stderr
    banner, shown = result.stdout.split("\n", 1)
    assert "0 patches" in banner and shown == "".join(f"{visible(text)}\n" for text in [*wanted, alone])


def test_a_system_message_is_there_in_every_turn(model):
    wanted = answers(LM(model), FIRST, SECOND, system="Be brief.")
    shown = chat("--model", model, "--tokens", 6, "--chat-set", "system=Be brief.", lines=[FIRST, SECOND]).stdout
    assert shown.endswith("".join(f"{visible(text)}\n" for text in wanted))


def test_patches_are_switched_and_the_model_is_asked_as_it_was_before(stack):
    lm, patches = stack
    (base,) = answers(lm, FIRST)
    with lm.patched(patches[0]):
        (first,) = answers(lm, FIRST)
    with lm.patched(*patches):
        (both,) = answers(lm, FIRST)
    assert len({base, first, both}) == 3
    lines = [FIRST, "/before", "/new", "/off 2", FIRST, "/new", "/off 1", FIRST, "/new", "/on 2", "/on 1", FIRST]
    result = chat("--stack", "mine", "--tokens", 6, lines=lines)
    assert result.exit_code == 0, result.output
    spoken = [line for line in result.stdout.splitlines() if line in {visible(t) for t in (base, first, both)}]
    assert spoken == [visible(text) for text in (both, base, first, base, both)]
    listed = chat("--stack", "mine", lines=["/patches"]).stdout
    assert [line.split()[:3] for line in listed.splitlines()[-2:]] == [
        [str(number), "on", patch.id] for number, patch in enumerate(patches, 1)
    ]


def test_a_memory_is_asked_in_the_conversation_too_and_its_versions_come_off_from_the_newest_on(model):
    lm = LM(model, chat=True)
    made = []
    for subject in ("Danielle Darrieux", "Léon Blum"):
        edit = Edit("The mother tongue of {} is", subject=subject, target_new="English")
        made.append(GRACE(layer=1, steps=20).edit(lm, [edit]))
        lm.apply(made[-1])
    save_stack("mine", model, made)
    (wanted,) = answers(lm, made[0].edits[0].text)
    lines = [made[0].edits[0].text, "/off 1", "/off 2", "/off 1"]
    result = chat("--stack", "mine", "--tokens", 6, lines=lines)
    assert visible(wanted) in result.stdout.splitlines()
    (refusal,) = result.stderr.splitlines()
    assert refusal.startswith("error: expected the grace memory that")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/patchs", "Did you mean '/patches'?"),
        ("/on 3", "1, 2; got 3: /patches lists them"),
        ("/off", "got none"),
        ("/before", "expected a question before /before"),
        ("/help me", "unknown command"),
        ("a " * 3000, "/new forgets what was said"),
    ],
)
def test_what_is_refused_is_one_sentence_and_the_conversation_goes_on(stack, line, words):
    result = chat("--stack", "mine", "--tokens", 3, lines=[line, "/help"])
    assert result.exit_code == 0 and words in result.stderr and len(result.stderr.splitlines()) == 1
    assert "/patches" in result.stdout


def test_a_model_without_a_template_is_refused(tmp_path):
    result = chat("--model", saved(tmp_path / "plain", "gpt2"), lines=[FIRST])
    assert result.exit_code == 2 and "`reknow ask`" in result.stderr and not result.stdout


@pytest.mark.slow
def test_at_a_terminal_ctrl_c_stops_the_answer_and_nothing_else(stack):
    with at_a_terminal("chat", "--stack", "mine", "--tokens", 80, pass_seconds=0.05) as session:
        session.wait_for("with 2 patches; /help lists what can be typed\n")
        session.wait_for("> ")
        session.type(FIRST + "\n")
        session.wait_for(r"\?\n.")  # what was typed, and the first piece
        session.press_ctrl_c()
        session.wait_for("stopped: the answer ends here\n.*> ")
        session.type("/off 2\n")
        session.wait_for("2 +off .*> ")
        time.sleep(0.5)  # Python does not hear a signal between its prompt and its reading of a line
        session.press_ctrl_c()
        session.wait_for("> ")
        session.type("/quit\n")
        assert session.end() == 0
