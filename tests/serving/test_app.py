"""`reknow serve` over HTTP, asked by OpenAI's own client."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from openai import OpenAI
from typer.testing import CliRunner

from conftest import saved, some_patch
from reknow import GRACE, LM, Chat, Edit, Patch
from reknow.cli.app import app
from reknow.cli.serving import _base
from reknow.model.chat import Message
from reknow.patching.stack import read_history, read_stack, save_stack
from reknow.registry import make
from serving_process import Served, serving

TEMPLATE = (
    "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
EDIT = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")
PROMPTS = [EDIT.text, "The capital of Peru is"]
TALK = [("user", "Who owns Beats Music?"), ("assistant", "Apple."), ("user", "Where is the Eiffel Tower?")]
NAMES = ["weights", "hook", "prompt"]
TOKENS = 8


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with a model and three stacks, each changed in another way; and the model."""
    folder = tmp_path_factory.mktemp("served")
    model = saved(folder / "model", "llama")
    lm = LM(model)
    lm.tokenizer.chat_template = TEMPLATE
    lm.tokenizer.save_pretrained(model)
    made = [
        some_patch(lm, size=30.0),
        GRACE(layer=1, steps=20).edit(lm, [EDIT]),
        make("ike-zero", {}).edit(lm, [EDIT]),
    ]
    for name, patch in zip(NAMES, made, strict=True):
        save_stack(folder / name, model, [patch])
    some_patch(lm, 7, size=30.0).save(folder / "more.patch")
    return folder, lm


@pytest.fixture(scope="module")
def served(scene):
    folder, _ = scene
    with serving(*NAMES, "empty", "--new", "--model", "model", "--token", "secret", folder=folder) as served:
        yield served


@pytest.fixture
def client(served) -> OpenAI:
    return served.client("secret")


def wanted(lm: LM, folder: Path, name: str) -> tuple[list[str], str]:
    """What the stack of that name says to the prompts, and in the conversation."""
    with lm.stacked(read_stack(folder / name)[1] if name != "model" else ()):
        texts = list(lm.generate(PROMPTS, TOKENS))
        lm.chat = Chat(history=tuple(Message(*said) for said in TALK[:-1]))
        try:
            return texts, lm.generate(TALK[-1][1], TOKENS)
        finally:
            lm.chat = None


def complete(client: OpenAI, name: str, prompt: str, stream: bool = False) -> str:
    options = {"model": name, "prompt": prompt, "max_tokens": TOKENS}
    if not stream:
        return client.completions.create(**options).choices[0].text
    return "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))


def talk(client: OpenAI, name: str, stream: bool = False) -> str:
    messages = [{"role": role, "content": content} for role, content in TALK]
    options = {"model": name, "messages": messages, "max_tokens": TOKENS}
    if not stream:
        return client.chat.completions.create(**options).choices[0].message.content
    return "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)
    )


def send(served: Served, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict]:
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/octet-stream"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    request = urllib.request.Request(f"{served.address}{path}", body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def refused(call, status: int, words: str) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        call()
    assert error.value.status_code == status and words in str(error.value)


def test_the_models_are_the_base_and_the_stacks(client):
    assert [model.id for model in client.models.list()] == ["model", *NAMES, "empty"]
    assert client.models.retrieve("hook").id == "hook"
    refused(lambda: client.models.retrieve("nobody"), 404, "weights, hook, prompt, empty")


def test_eight_clients_on_three_stacks_at_once_get_their_own_stack_s_answers(scene, client):
    folder, lm = scene
    answers = {name: wanted(lm, folder, name) for name in ["model", *NAMES]}
    assert len({texts[0] for texts, _ in answers.values()}) == 4
    turns = [(name, ask, stream) for name in answers for ask in (0, 1, "talk") for stream in (False, True)] * 2

    def one(turn) -> None:
        name, ask, stream = turn
        if ask == "talk":
            assert talk(client, name, stream) == answers[name][1], turn
        else:
            assert complete(client, name, PROMPTS[ask], stream) == answers[name][0][ask], turn

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(one, turns))


def test_an_answer_says_how_long_it_is_and_why_it_ended(scene, client):
    _, lm = scene
    whole = client.completions.create(model="model", prompt=PROMPTS, max_tokens=TOKENS, stop=["\x00"])
    assert [choice.text for choice in whole.choices] == lm.generate(PROMPTS, TOKENS)
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    assert whole.usage.completion_tokens == 2 * TOKENS
    assert whole.usage.prompt_tokens == sum(len(lm.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    chunks = list(
        client.chat.completions.create(
            model="model",
            messages=[{"role": "user", "content": "Hi"}],
            max_completion_tokens=TOKENS,
            temperature=2,
            seed=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage.completion_tokens == TOKENS and chunks[-2].choices[0].finish_reason == "length"
    assert len(chunks) > 4, "while it is written"
    drawn = dict(model="model", prompt=PROMPTS[0], max_tokens=TOKENS, temperature=5)
    assert len({client.completions.create(**drawn).choices[0].text for _ in range(4)}) > 1, "without a seed"
    assert len({client.completions.create(**drawn, seed=1).choices[0].text for _ in range(2)}) == 1
    hi = {"model": "model", "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": TOKENS}
    both = client.chat.completions.create(**hi, n=2, temperature=2, top_p=0.9, seed=5)
    assert [choice.index for choice in both.choices] == [0, 1] and both.usage.completion_tokens == 2 * TOKENS
    assert both.choices[0].message.content != both.choices[1].message.content


def test_what_is_refused(served, client):
    ask = {"model": "weights", "prompt": "a", "max_tokens": 2}
    refused(lambda: client.completions.create(**ask | {"model": "nobody"}), 404, "weights, hook, prompt, empty")
    refused(lambda: served.client("guess").completions.create(**ask), 401, "bearer token")
    refused(lambda: client.completions.create(**ask | {"prompt": "a " * 6000}), 400, "tokens")
    refused(lambda: client.completions.create(**ask | {"prompt": "a " * 6000}, stream=True), 400, "tokens")
    refused(lambda: client.completions.create(**ask | {"max_tokens": 10**6}), 400, "to be written")
    refused(lambda: client.completions.create(**ask, logprobs=2), 400, "'logprobs'")
    assert send(served, "GET", "/health", Authorization="")[0] == 200
    for path in ("/v1/models", "/stacks"):
        assert send(served, "GET", path, Authorization="Bearer ")[0] == 401
    status, body = send(served, "POST", "/v1/completions", json.dumps(ask).encode(), Content_Type="text/plain")
    assert status == 415 and "application/json" in body["error"]["message"]
    assert send(served, "GET", "/nowhere")[0] == 404 and send(served, "PUT", "/stacks")[0] == 405
    assert send(served, "POST", "/v1/completions", b"{", Content_Type="application/json")[0] == 400


def test_a_page_of_another_site_is_not_served(served):
    request = urllib.request.Request(f"{served.address}/v1/models", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)


def test_patches_go_on_and_come_off_while_it_runs(scene, served, client):
    folder, lm = scene
    patch, body = Patch.load(folder / "more.patch"), (folder / "more.patch").read_bytes()
    before = complete(client, "empty", PROMPTS[0])
    status, told = send(served, "POST", "/stacks/empty/patches?why=because", body)
    assert status == 201 and [one["id"] for one in told["patches"]] == [patch.id]
    with lm.patched(patch):
        assert complete(client, "empty", PROMPTS[0]) == lm.generate(PROMPTS[0], TOKENS) != before
    assert complete(client, "weights", PROMPTS[0]) == wanted(lm, folder, "weights")[0][0]
    assert read_stack(folder / "empty")[1] == [patch]
    assert send(served, "POST", "/stacks/empty/patches", body)[0] == 409
    assert send(served, "POST", "/stacks/nobody/patches", body)[0] == 404
    status, told = send(served, "POST", "/stacks/empty/patches", body[:-9])
    assert status == 400 and "what was sent" in told["error"]["message"] and "/tmp" not in told["error"]["message"]
    assert send(served, "POST", "/stacks/empty/patches", body, Content_Type="text/plain")[0] == 415
    assert send(served, "DELETE", "/stacks/empty/patches/0000")[0] == 404
    status, told = send(served, "DELETE", f"/stacks/empty/patches/{patch.id}?why=enough")
    assert (status, told) == (200, {"name": "empty", "patches": []}) and complete(
        client, "empty", PROMPTS[0]
    ) == before
    lines = [line.entry for line in read_history(folder / "empty")]
    assert [(entry.action, entry.why) for entry in lines] == [("apply", "because"), ("revert", "enough")]
    found = send(served, "GET", "/stacks")[1]
    assert found["base"] == "model" and [stack["name"] for stack in found["stacks"]] == [*NAMES, "empty"]
    assert send(served, "GET", "/stacks/hook")[1]["patches"][0]["edits"] == [f"{EDIT.text} → English"]


def test_what_the_command_line_applies_is_served(scene, client, monkeypatch):
    folder, lm = scene
    monkeypatch.chdir(folder)
    patch = Patch.load("more.patch")
    result = CliRunner().invoke(app, ["apply", "more.patch", "--stack", "empty", "--model", str(folder / "model")])
    assert result.exit_code == 0, result.output
    with lm.patched(patch):
        assert complete(client, "empty", PROMPTS[0]) == lm.generate(PROMPTS[0], TOKENS)
    assert CliRunner().invoke(app, ["revert", patch.id, "--stack", "empty"]).exit_code == 0
    assert complete(client, "empty", PROMPTS[0]) == lm.generate(PROMPTS[0], TOKENS)


def test_who_leaves_in_the_middle_keeps_nobody_waiting(scene, client):
    _, lm = scene
    stream = client.completions.create(model="model", prompt="a", max_tokens=1500, stream=True)
    next(iter(stream))
    stream.close()
    assert complete(client, "model", PROMPTS[0]) == lm.generate(PROMPTS[0], TOKENS)


def run(*arguments: object):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def test_what_cannot_be_served_is_refused_before_the_model_is_opened(scene, monkeypatch, tmp_path):
    folder, _ = scene
    monkeypatch.chdir(folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = run("hook", "--port", taken.getsockname()[1])
        assert said.exit_code == 2 and "give another --port" in said.stderr
    said = run("hook", "hok", "--model", "model")
    assert said.exit_code == 2 and "expected a stack folder at hok" in said.stderr and "--new" in said.stderr
    said = run("hook", "--model", "demo:gpt2")
    assert said.exit_code == 2 and "serve each base by itself" in said.stderr
    said = run("hook", Path("..") / folder.name / "hook")
    assert said.exit_code == 2 and "name of its own" in said.stderr


@pytest.mark.slow
def test_a_new_stack_beside_one_that_is_named_as_the_model_has_its_base(scene):
    folder, _ = scene
    assert _base([folder / "fresh"], str(folder / "hook")) == _base([folder / "hook"], None)


@pytest.mark.slow
def test_beyond_loopback_is_said(scene):
    folder, _ = scene
    with serving("hook", "--host", "0.0.0.0", folder=folder) as open_to_all:
        pass
    assert "0.0.0.0 can be reached from other machines" in open_to_all.warned and "--token" in open_to_all.warned


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_every_stack_whole_and_ctrl_c_ends_it(scene, tmp_path):
    folder, lm = scene
    body, patch = (folder / "more.patch").read_bytes(), Patch.load(folder / "more.patch")
    stacks = [(folder / name) for name in NAMES]
    known = {stack: read_stack(stack)[1] for stack in stacks}
    for delay in (0.0, 0.3, 1.0):
        with serving(*NAMES, "--model", "model", folder=folder) as served:

            def keep_busy(served=served) -> None:
                with pytest.raises((openai.APIError, OSError)):
                    while True:
                        complete(served.client(), "hook", PROMPTS[0], stream=True)

            def change(served=served) -> None:
                with pytest.raises(OSError):
                    while True:
                        send(served, "POST", "/stacks/weights/patches", body)
                        send(served, "DELETE", f"/stacks/weights/patches/{patch.id}")

            threads = [threading.Thread(target=work) for work in (keep_busy, change)]
            for thread in threads:
                thread.start()
            time.sleep(delay)
            served.process.kill()
            for thread in threads:
                thread.join(60)
        for stack in stacks:
            found = read_stack(stack)[1]
            assert (
                found in (known[stack], [*known[stack], patch]) if stack.name == "weights" else found == known[stack]
            )
            assert all(line.problem is None for line in read_history(stack))
        save_stack(folder / "weights", str(folder / "model"), known[folder / "weights"])
    with serving(*NAMES, folder=folder) as served:
        assert complete(served.client(), "weights", PROMPTS[0]) == wanted(lm, folder, "weights")[0][0]
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(60) == 130


@pytest.mark.slow
def test_facts_of_a_model_that_knows_some_by_every_kind_of_memory(tmp_path):
    lm = LM.demo("gpt2")
    for name in ("rome", "grace", "ike", "serac"):
        save_stack(tmp_path / name, "demo:gpt2", [make(name, {}).edit(lm, [EDIT])])
    with serving("rome", "grace", "ike", "serac", folder=tmp_path) as served:
        client = served.client()
        for name in ("rome", "grace", "ike", "serac"):
            with lm.stacked(read_stack(tmp_path / name)[1]):
                texts = list(lm.generate(PROMPTS, TOKENS))
            assert [complete(client, name, prompt, stream=True) for prompt in PROMPTS] == texts
            assert texts[0].split()[0].strip(".,") == "English"
        assert complete(client, "demo:gpt2", PROMPTS[0]).startswith(" French")
