"""Chat templates that open a thought, take arguments or a system message; tokenizers without special tokens."""

from __future__ import annotations

import pytest
import torch
from tokenizers import processors
from typer.testing import CliRunner

from families import tiny_model, tiny_tokenizer
from reknow import FT, LM, ROME, Chat, Edit
from reknow.cli.app import app
from reknow.cli.options import ChatOpening
from reknow.errors import InputError, ModelError
from reknow.model.chat import Message, close_thought
from reknow.model.tokens import Text

EDIT = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")
THINKING = (
    "{{bos_token}}{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is not defined or enable_thinking %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def chatting(template: str = THINKING, chat: bool | Chat = True) -> LM:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return LM((tiny_model("llama"), tokenizer), chat=chat)


def shown(lm: LM, text: Text) -> str:
    (row,) = lm.encode([text])
    return lm.tokenizer.decode(row.ids)


def test_a_thought_that_the_template_opens_is_closed_before_the_answer():
    text = Text("What is the capital of France?", "Rome")
    expected = "<s><user>What is the capital of France?<assistant><think>\n\n</think>\n\nRome"
    opened, told = chatting(), chatting(chat=Chat(arguments={"enable_thinking": False}))
    assert shown(opened, text) == shown(told, text) == expected
    (row,), (asked,) = opened.encode([text]), opened.encode([Text(text.prompt)])
    assert row.ids[: row.prompt_length] == asked.ids  # read and written behind the same tokens
    (about,) = opened.encode([Text.about(EDIT)])
    assert opened.tokenizer.decode(about.ids[about.subject_first : about.subject_last + 1]).strip() == EDIT.subject
    assert FT(layer=1, steps=3).edit(opened, [EDIT]).notes["losses"][0] == pytest.approx(
        opened.score([EDIT.text], ["English"])[0].nll, rel=1e-3
    )


def test_what_was_said_before_stands_before_the_prompt():
    history = (Message("user", "Hi?"), Message("assistant", "Ho."))
    lm = chatting(chat=Chat("Be brief.", {"enable_thinking": False}, history))
    assert shown(lm, Text("Who?", "He")) == (
        "<s><system>Be brief.<user>Hi?<assistant>Ho.<user>Who?<assistant><think>\n\n</think>\n\nHe"
    )


@pytest.mark.parametrize(
    ("head", "whole"),
    [
        ("<Assistant><think>", "<Assistant><think>\n\n</think>\n\n"),
        ("[/INST][THINK]", "[/INST][THINK]\n\n[/THINK]\n\n"),
        ("<|START_THINKING|>", "<|START_THINKING|>\n\n<|END_THINKING|>\n\n"),
        ("<|begin_of_thought|>\n", "<|begin_of_thought|>\n\n<|end_of_thought|>\n\n"),
        ("<seed:think>", "<seed:think>\n\n</seed:think>\n\n"),
        ("◁think▷", "◁think▷\n\n◁/think▷\n\n"),
        ("<reasoning>\n", "<reasoning>\n\n</reasoning>\n\n"),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("<think>done</think>", "<think>done</think>"),
        ("<|assistant|>\n", "<|assistant|>\n"),
        ("I think", "I think"),
    ],
)
def test_thoughts_of_every_spelling_are_closed(head, whole):
    assert close_thought(head) == whole


def test_a_system_message_stands_in_front():
    lm = chatting(chat=Chat(system="Be brief.", arguments={"enable_thinking": False}))
    assert shown(lm, Text("Hi")) == "<s><system>Be brief.<user>Hi<assistant><think>\n\n</think>\n\n"


def test_what_a_template_does_not_take_is_refused_when_the_model_is_opened():
    with pytest.raises(InputError, match="'enable_thinkng', which it does not name"):
        chatting(chat=Chat(arguments={"enable_thinkng": False}))
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + THINKING
    with pytest.raises(ModelError, match="system and user messages; it says 'no system role'"):
        chatting(strict, Chat(system="Be brief."))
    assert chatting(strict).chat == Chat()
    with pytest.raises(ModelError, match="chat=False"):
        LM((tiny_model("llama"), tiny_tokenizer()), chat=Chat())
    with pytest.raises(InputError, match="got 'yes'"):
        chatting(chat="yes")  # type: ignore[arg-type]


def test_the_command_line_says_the_same(tmp_path):
    lm = chatting()
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    opened = ChatOpening(chat_set=["system=Be brief.", "enable_thinking=False"]).open(str(tmp_path / "model"))
    assert opened.chat == Chat("Be brief.", {"enable_thinking": False})
    for setting, reason in (("thinking", "NAME=VALUE"), ("thinking=1", "which it does not name")):
        asked = ["edit", "The home of {Peru} is", "x", "--model", str(tmp_path / "model"), "--chat-set", setting]
        refused = CliRunner().invoke(app, asked)
        assert refused.exit_code == 2 and reason in refused.output


@pytest.mark.parametrize("named", [{}, {"bos_token": "<s>"}, {"eos_token": "</s>"}])
def test_a_tokenizer_without_named_special_tokens_has_contexts(named):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for name, token in named.items():
        setattr(tokenizer, name, token)
    lm = LM((tiny_model("llama"), tokenizer))
    (row,) = lm.encode([Text("")])
    assert tokenizer.decode(row.ids) == next(iter(named.values()), "\n")
    assert len(lm.generate("", 4)) > 0
    patch = ROME(layer=0, steps=3, context_source="model").edit(lm, [EDIT])
    assert all(bool(torch.isfinite(delta.dense()).all()) for delta in patch.deltas.values())


@pytest.mark.filterwarnings("error")
def test_a_chat_model_asked_outside_its_template_says_so_once():
    lm = chatting(chat=False)
    lm.generate(["The capital of France is", "Who? Nobody"], 1)
    with pytest.warns(
        UserWarning, match=r"asked “Who wrote Hamlet\?” outside its chat template.*chat=True \(--chat\)"
    ):
        lm.generate(["The capital of France is", "Who wrote Hamlet? "], 1)
    lm.generate("Who wrote Faust?", 1)
    chatting().generate("Who wrote Faust?", 1)
    LM((tiny_model("llama"), tiny_tokenizer())).generate("Who wrote Faust?", 1)  # it has no template
