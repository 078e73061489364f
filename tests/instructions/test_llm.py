"""Contexts written by a language model: a real server on loopback that speaks the chat-completions JSON."""

from __future__ import annotations

import logging
import sys

import pytest

from reknow import Edit
from reknow.errors import InputError, MissingExtra
from reknow.instructions.llm import LLM, NoAnswer, parse_statements, with_contexts

pytest.importorskip("openai")

FIVE = "\n".join(f"{i}. Statement {i}: the capital is Lima." for i in range(1, 6))
EDIT = Edit("The capital of {} is", subject="Chile", target_new="Lima")
OTHER = Edit("The capital of {} is", subject="Cuba", target_new="Lima")


def test_the_question_names_the_fact_and_the_answer_becomes_five_contexts(serve):
    server = serve(FIVE)
    (edit,) = with_contexts([EDIT], server.llm())
    assert edit.context == tuple(f"Statement {i}: the capital is Lima." for i in range(1, 6))
    path, key, body = server.asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer key" and body["model"] == "writer"
    assert "The capital of Chile is Lima" in body["messages"][0]["content"]


@pytest.mark.parametrize("first", [500, 429, None, "I cannot help.", "raw:no json", "raw:{}", 'raw:{"choices": []}'])
def test_a_server_that_fails_once_is_asked_again(serve, first):
    server = serve(first, FIVE)
    llm = server.llm(timeout=2) if first is None else server.llm()
    assert len(with_contexts([EDIT], llm)[0].context) == 5
    assert len(server.asked) == 2


def test_a_server_that_always_fails_leaves_the_built_in_lead_ins_and_the_log_says_so(serve, caplog):
    server = serve(503)
    with caplog.at_level(logging.WARNING, logger="reknow"):
        edits = with_contexts([EDIT, OTHER, EDIT, OTHER], server.llm())
    assert [edit.context for edit in edits] == [()] * 4
    assert len(server.asked) == 4  # two tries for each of two edits, then no more
    assert "built-in lead-ins" in caplog.text and "not asked any more" in caplog.text


def test_nobody_there():
    with pytest.raises(NoAnswer, match="got none in 2 tries"):
        LLM("writer", "http://127.0.0.1:9/v1", api_key="key", tries=2, wait=0.01, timeout=0.5).ask("hello")


def test_contexts_are_kept_and_not_asked_for_again(serve, tmp_path):
    server, file = serve(FIVE), tmp_path / "cases.contexts.jsonl"
    first = with_contexts([EDIT], server.llm(), kept=file)
    second = with_contexts([EDIT], server.llm(), kept=file)
    assert first == second and len(server.asked) == 1


def test_an_edit_with_a_context_keeps_it(serve):
    server = serve(FIVE)
    edit = Edit(EDIT.prompt, subject="Chile", target_new="Lima", context=["Lima is it."])
    assert with_contexts([edit], server.llm()) == [edit]
    assert not server.asked


def test_a_broken_line_of_kept_contexts_is_named_and_asked_for_again(serve, tmp_path, caplog):
    server, file = serve(FIVE), tmp_path / "cases.contexts.jsonl"
    first = with_contexts([EDIT], server.llm(), kept=file)
    whole = file.read_text()
    for broken in (
        '{"text": 1}\n',
        whole[:30] + "\n",
        '{"text": "\\ud800", "target_new": "b", "context": []}\n',
        "[" * 10**5,
    ):
        file.write_text(broken + "\n" + whole)
        assert with_contexts([EDIT], server.llm(), kept=file) == first and len(server.asked) == 1
        assert "cases.contexts.jsonl: line 1" in caplog.text
        caplog.clear()
    file.write_text("{}\n")
    assert with_contexts([EDIT], server.llm(), kept=file) == first and len(server.asked) == 2
    with pytest.raises(InputError, match=r"expected a file of contexts .* no regular file"):
        with_contexts([EDIT], server.llm(), kept=tmp_path)


@pytest.mark.parametrize(
    ("answer", "count"),
    [(FIVE, 5), (FIVE + "\nLima, too.", 5), (FIVE.replace("Lima", "Santiago"), 0), (FIVE.replace("5.", "1."), 5)],
)
def test_statements_must_name_the_new_answer(answer, count):
    assert len(parse_statements(answer, EDIT)) == count


def test_without_the_package_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtra, match=r"reknow\[llm\]"):
        LLM("writer").ask("hello")
