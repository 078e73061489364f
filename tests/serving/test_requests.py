"""Bodies of requests: what is read, what is passed over, what is refused."""

from __future__ import annotations

import json

import pytest

from reknow.errors import InputError
from reknow.model.chat import Message
from reknow.serving.requests import ChatRequest, CompletionRequest, read_request

ASKED = {"model": "alice", "prompt": "The capital of Peru is"}
HI = {"role": "user", "content": "Hi?"}


def read(kind=CompletionRequest, **fields):
    body = (ASKED if kind is CompletionRequest else {"model": "alice", "messages": [HI]}) | fields
    return read_request(kind, json.dumps(body).encode())


def test_what_is_asked_is_read():
    request = read(max_tokens=3, temperature=1, stop=["\n", ""], seed=-1, stream=True)
    assert request.prompts == [ASKED["prompt"]] and request.stops == ("\n",)
    assert request.tokens(10, 100) == 3
    assert request.sampling(50) == {"top_k": 50, "temperature": 1.0, "top_p": 1.0, "seed": 2**63 - 1}
    assert read(temperature=1, top_p=0.5).sampling(50)["top_p"] == 0.5 and (read().choices, read(n=3).choices) == (
        1,
        3,
    )
    assert read(top_p=0.5, top_k=3).sampling(50) == {}, "the likeliest tokens without a temperature"
    assert read(prompt=["a", "b"]).prompts == ["a", "b"] and read().sampling(50) == {}
    assert [read().tokens(90, positions) for positions in (100, None, 20)] == [10, 256, 1]


def test_what_changes_nothing_is_passed_over():
    neutral = {
        "best_of": 1,
        "logprobs": None,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "user": "me",
        "suffix": None,
    }
    assert read(**neutral).model == "alice"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"logprobs": 2}, "'logprobs'"),
        ({"presence_penalty": 0.5}, "'presence_penalty'"),
        ({"n": 0}, "n: "),
        ({"n": 17}, "n: "),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"tools": [{"type": "function"}]}, "'tools'"),
        ({"unheard": "of"}, "'unheard'"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"model": ""}, "model"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
    ],
)
def test_what_is_not_done_is_refused_by_name(fields, words):
    with pytest.raises(InputError, match=rf"^expected a request.*{words}"):
        read(**fields)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"prompt": "a"}', b'{"model": "a"}', b"\xff"])
def test_what_is_no_request_is_refused(body):
    with pytest.raises(InputError, match=r"^expected a request"):
        read_request(CompletionRequest, body)


def test_a_conversation_ends_with_a_question():
    said = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        HI,
        {"role": "assistant", "content": "Ho."},
        {"role": "user", "content": "Who?", "name": "me"},
    ]
    request = read(ChatRequest, messages=said, max_completion_tokens=4, chat_template_kwargs={"think": False})
    question, chat = request.conversation()
    assert question == "Who?" and chat.arguments == {"think": False} and request.tokens(0, None) == 4
    assert chat.history == (Message("system", "Be brief."), Message("user", "Hi?"), Message("assistant", "Ho."))
    with pytest.raises(InputError, match="one of assistant"):
        read(ChatRequest, messages=said[:3]).conversation()
    for wrong in ([], [{"role": "tool", "content": "a"}], [{"role": "user", "content": [{"type": "image_url"}]}]):
        with pytest.raises(InputError, match="messages"):
            read(ChatRequest, messages=wrong)
