"""Patches, stacks, editors and statistics through the hub's own client over HTTP, to a small hub on loopback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants as client
import pytest
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from conftest import bits, make_lm, same, saved, some_patch
from hub_server import Hub
from reknow import LM, Patch, cli, method
from reknow.cli import app
from reknow.editing.covariance import statistics
from reknow.errors import InputError, PatchError
from reknow.export.sharing import gather, pull, with_card
from reknow.files.hub import Address, fetch, read_address, send
from reknow.learning.editors import Editor
from reknow.patching.history import HISTORY_FILE
from reknow.patching.stack import read_history, read_stack, save_stack
from reknow.serving.stacks import Stacks, stack_names

ADDRESS = Address("zoe/edits")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of its own; the client is told of it as HF_ENDPOINT, HF_HOME and HF_TOKEN do where it starts."""
    hub = Hub()
    monkeypatch.setattr(client, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(client, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(client, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(client, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(client, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("model"), "gpt2")


@pytest.fixture(scope="module")
def patches(model) -> list[Patch]:
    lm = LM(model)
    return [some_patch(lm, seed) for seed in (1, 2, 3)]


def push(*sources: Path, base: str | None = None) -> str:
    shared = gather(sources, base)
    return send(ADDRESS, with_card(shared, ADDRESS), "a message")


def test_a_patch_comes_back_as_it_went(hub, patches, tmp_path):
    push(patches[0].save(tmp_path / "a.patch"))
    kind, (place,) = pull(ADDRESS, tmp_path / "back.patch")
    assert kind == "patch" and place.read_bytes() == (tmp_path / "a.patch").read_bytes()
    assert hub.messages == ["a message"]
    _, files = hub.commits["zoe/edits"][-1]
    assert set(files) == {".gitattributes", "README.md", "reknow.json", f"{patches[0].id}.patch"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.tags == ["reknow", "knowledge-editing", "model-editing", "reknow-patch"]
    assert "The capital of Land 1 is → Lima" in card.text and "hub:zoe/edits" in card.text


def test_an_adapter_is_a_folder(hub, model, patches, tmp_path):
    lm = LM(model)
    tuned = method("lora", layers=(1,), steps=1).edit(lm, patches[0].edits)
    push(tuned.save(tmp_path / "tuned"))
    _, (place,) = pull(ADDRESS, tmp_path / "back")
    assert Patch.load(place).id == tuned.id and sorted(p.name for p in place.iterdir()) == sorted(
        p.name for p in (tmp_path / "tuned").iterdir()
    )


def test_a_stack_opens_at_every_revision(hub, model, patches, tmp_path):
    stack = save_stack(tmp_path / "stack", model, patches[:1], action="apply", why="first")
    with pytest.raises(InputError, match=r"expected a base that others have too; that of .* is the folder"):
        gather([stack], None)
    old = push(stack, base=model)  # any name goes
    save_stack(stack, model, patches[1:], action="apply", why="second")
    new = push(stack, base=model)
    assert set(hub.commits["zoe/edits"][-1][1]) == {
        *(f"{patch.id}.patch" for patch in patches[1:]),
        *(".gitattributes", "README.md", "reknow.json", "stack.json", HISTORY_FILE),
    }
    for revision, wanted in ((old, patches[:1]), (new, patches[1:]), (None, patches[1:])):
        opened = LM(str(Address("zoe/edits", revision)))
        assert list(opened.patches) == wanted and opened.name == model
    here = LM(str(stack))
    assert same(bits(opened), bits(here))
    _, (place,) = pull(ADDRESS, tmp_path / "back")
    assert [line.problem for line in read_history(place)] == [None, None]
    assert [line.entry.why for line in read_history(place)] == ["first", "second"]
    save_stack(place, read_stack(place)[0], patches[1:2], action="revert")
    assert len(read_history(place)) == 3


def test_a_trained_editor(hub, patches, tmp_path):
    editor = Editor("mend", {"rank": 1}, {"a": torch.ones(2)}, patches[0].base, torch.arange(3))
    file = editor.save(tmp_path / "editor.safetensors")
    push(file, base="demo:gpt2")
    kind, (place,) = pull(ADDRESS, tmp_path / "trained")
    assert kind == "editor" and torch.equal(Editor.load(place).tensors["a"], torch.ones(2))
    assert "--method mend" in hub.commits["zoe/edits"][-1][1]["README.md"].decode()


def test_statistics_go_where_edits_look_for_them(hub, tmp_path, monkeypatch):
    lm = make_lm("gpt2")
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path / "here"))
    made = statistics(lm, [1], tokens=200)[1]
    push(Path(made.file), base="demo:gpt2")
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path / "there"))
    kind, (place,) = pull(ADDRESS, None)
    assert kind == "statistics" and place == tmp_path / "there" / Path(made.file).name
    before = place.stat().st_mtime_ns
    found = statistics(make_lm("gpt2"), [1], tokens=200)[1]
    assert torch.equal(found.covariance, made.covariance) and Path(found.file) == place
    assert place.read_bytes() == Path(made.file).read_bytes() and before
    with pytest.raises(InputError, match="expected no place for statistics"):
        pull(ADDRESS, tmp_path / "x")


# --- what is wrong -----------------------------------------------------------------------------------------------


def test_a_repository_of_something_else_is_not_written_over(hub, patches, tmp_path):
    hub.commits["zoe/edits"] = [("0" * 40, {"config.json": b"{}"})]
    with pytest.raises(InputError, match=r"expected a repository that reknow pushed, or an empty one; .*config"):
        push(patches[0].save(tmp_path / "a.patch"))
    assert len(hub.commits["zoe/edits"]) == 1
    with pytest.raises(InputError, match="expected what `reknow push` wrote"):
        pull(ADDRESS, tmp_path / "x")
    with pytest.raises(PatchError, match="expected a stack at hub:zoe/edits; it is none"):
        LM("hub:zoe/edits")


def test_a_commit_that_came_between_is_not_lost(hub, patches, tmp_path):
    file = patches[0].save(tmp_path / "a.patch")
    push(file)

    def between() -> None:
        hub.before_commit = lambda: None
        _, files = hub.commits["zoe/edits"][-1]
        hub.commits["zoe/edits"].append(("f" * 40, {**files, "more.patch": b"x"}))

    hub.before_commit = between
    with pytest.raises(InputError, match="another commit came between"):
        push(patches[1].save(tmp_path / "b.patch"))
    assert hub.commits["zoe/edits"][-1][0] == "f" * 40


def test_who_is_not_known_and_what_is_not_there(hub, patches, tmp_path, monkeypatch):
    file = patches[0].save(tmp_path / "a.patch")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match="hf auth login"):
        push(file)
    assert hub.commits == {}
    with pytest.raises(InputError, match="there is none, or it is private"):
        fetch(ADDRESS)
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
    push(file)
    with pytest.raises(InputError, match="it has no revision gone: give a branch, a tag or a commit"):
        fetch(Address("zoe/edits", "gone"))


def test_a_file_that_is_not_the_one_that_was_pushed(hub, patches, tmp_path):
    push(patches[0].save(tmp_path / "a.patch"))
    _, files = hub.commits["zoe/edits"][-1]
    name = f"{patches[0].id}.patch"
    hub.commits["zoe/edits"].append(("a" * 40, {**files, name: files[name][:-1] + b"x"}))
    with pytest.raises(InputError, match=f"expected {name} of hub:zoe/edits as it was pushed"):
        pull(ADDRESS, tmp_path / "x")
    for outside in ("../../x.patch", "/tmp/x.patch", "gone.patch"):
        record = json.loads(files["reknow.json"]) | {"files": {outside: "0" * 64}}
        hub.commits["zoe/edits"].append((hub.sha(), {**files, "reknow.json": json.dumps(record).encode()}))
        with pytest.raises(InputError, match=r"as it was pushed"):
            pull(ADDRESS, tmp_path / "x")
    assert not (tmp_path / "x").exists()


ADDRESSES = ["zoe/edits", "hub:", "hub:edits", "hub:a/b/c", "hub:zoe/edits@", "hub:zo e/x", "hub:../x"]


@pytest.mark.parametrize("text", ADDRESSES)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(InputError, match="expected hub:owner/name or hub:owner/name@revision"):
        read_address(text)


def test_without_the_hub_the_cache_serves_what_was_fetched(hub, model, patches, tmp_path, monkeypatch):
    stack = save_stack(tmp_path / "stack", model, patches[:1])
    sha = push(stack, base=model)
    assert list(LM("hub:zoe/edits").patches) == patches[:1]
    monkeypatch.setattr(client, "HF_HUB_OFFLINE", True)
    for name in ("hub:zoe/edits", f"hub:zoe/edits@{sha}"):
        assert list(LM(name).patches) == patches[:1]
    with pytest.raises(InputError, match="the hub does not answer, and the cache does not have it"):
        LM("hub:zoe/other")


@pytest.fixture(params=["here", pytest.param("in a process of its own", marks=pytest.mark.slow)])
def reknow(request, hub, tmp_path, monkeypatch):
    """Runs a command; a process is told of the hub by its environment."""
    monkeypatch.chdir(tmp_path)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(cli.__file__).parents[2]),
        **{"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.TOKEN},
        **{"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
    }

    def run(*words: object) -> tuple[int, str, str]:
        arguments = [*map(str, words)]
        if request.param == "here":
            result = CliRunner().invoke(app, arguments)
            return result.exit_code, result.stdout, result.stderr
        line = [sys.executable, "-m", "reknow", *arguments]
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


def test_the_commands(hub, model, patches, tmp_path, reknow):
    stack = save_stack(tmp_path / "stack", model, patches[:2])
    status, said, wrong = reknow("push", stack, "--to", "hub:zoe/mine", "--base", model)
    assert status == 0, wrong
    sha = re.search(r"it opens as hub:zoe/mine@(\w+)", said)
    assert sha and sha[1] == hub.commits["zoe/mine"][-1][0]
    status, _, wrong = reknow("ask", "The capital of Peru is", "--model", f"hub:zoe/mine@{sha[1]}", "--tokens", "2")
    assert status == 0, wrong
    status, said, wrong = reknow("pull", "hub:zoe/mine", "back")
    assert (status, said) == (0, "wrote back\nhub:zoe/mine: stack\n"), wrong
    assert read_stack(tmp_path / "back")[1] == patches[:2]
    status, _, wrong = reknow("pull", "hub:zoe/none", "other")
    assert status == 2 and wrong.count("\n") == 1


def test_words_that_are_no_address(tmp_path, capsys):
    for words in (["pull", "zoe/x", "a"], ["push", "a.patch", "--to", "zoe"], ["ask", "x", "--model", "hub:zoe"]):
        with pytest.raises(SystemExit) as end:
            app(words)
        assert end.value.code == 2 and "expected hub:owner/name" in capsys.readouterr().err


# --- wherever a patch or a stack is taken ------------------------------------------------------------------------


def shared_as(hub, name: str, *sources: Path, base: str | None = None) -> str:
    """The address under which these are pushed."""
    address = Address(f"zoe/{name}")
    return str(Address(f"zoe/{name}", send(address, with_card(gather(sources, base), address), "a message")))


def test_a_patch_is_loaded_right_from_the_hub(hub, model, patches, tmp_path):
    patch = shared_as(hub, "patch", patches[0].save(tmp_path / "a.patch"))
    assert Patch.load(patch).id == patches[0].id == Patch.load("hub:zoe/patch").id
    tuned = method("lora", layers=(1,), steps=1).edit(LM(model), patches[0].edits)
    assert Patch.load(shared_as(hub, "tuned", tuned.save(tmp_path / "tuned"))).id == tuned.id
    stack = shared_as(hub, "stack", save_stack(tmp_path / "stack", model, patches[:1]), base=model)
    with pytest.raises(PatchError, match="expected a patch"):
        Patch.load(stack)
    with pytest.raises(PatchError, match=f"expected a stack at {patch}; it is none: put patches on with --patch"):
        LM(patch)
    editor = Editor("mend", {"rank": 1}, {"a": torch.ones(2)}, patches[0].base, torch.arange(3))
    with pytest.raises(InputError, match=r"expected a patch or a stack at .*; it holds editor: get it with"):
        Patch.load(shared_as(hub, "editor", editor.save(tmp_path / "e.safetensors"), base="demo:gpt2"))
    _, files = hub.commits["zoe/patch"][-1]
    name = f"{patches[0].id}.patch"
    hub.commits["zoe/patch"].append((hub.sha(), {**files, name: files[name][:-1] + b"x"}))
    with pytest.raises(InputError, match=f"expected {name} of hub:zoe/patch as it was pushed"):
        Patch.load("hub:zoe/patch")


@pytest.mark.slow
def test_commands_take_addresses(hub, model, patches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (patch.save(tmp_path / f"{patch.id}.patch") for patch in patches[:2])
    patch, other = shared_as(hub, "a", first), shared_as(hub, "b", second)
    stack = shared_as(hub, "stack", save_stack(tmp_path / "s", model, patches[:2], why="asked for"), base=model)

    def said(*words: str, status: int = 0) -> str:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == status, result.output
        return result.stdout if status == 0 else result.stderr

    asked, ids = "The capital of Peru is", [one.id for one in patches[:2]]
    said("apply", patch, other, "--stack", "mine", "--model", model)
    assert read_stack("mine")[1] == patches[:2]
    answers = [
        json.loads(said("ask", asked, "--json", *words))
        for words in (["--stack", stack], ["--model", model, "--patch", patch, "--patch", other], ["--stack", "mine"])
    ]
    assert answers[0] == answers[1] == answers[2] and answers[0]["patches"] == ids
    assert said("show", patch).startswith(f"patch {ids[0]}") and said("show", stack).startswith(f"{stack}: {model}")
    assert "asked for" in said("log", stack)
    assert "files: every patch is there" in CliRunner().invoke(app, ["verify", stack]).stdout
    assert json.loads(CliRunner().invoke(app, ["check", stack, "--json"]).stdout)["health"]["edits"] == 2
    assert "same base model" in said("diff", patch, stack)
    said("merge", patch, other, "--out", "both.patch")
    said("export", stack, "out", "--to", "lora")
    assert Patch.load("both.patch").notes["merged"] == ids and (tmp_path / "out" / "adapter_config.json").exists()
    said("revert", patch, "--stack", "mine")
    assert read_stack("mine")[1] == patches[1:2]
    written = ["apply", str(first), "--stack", stack], ["revert", ids[0], "--stack", stack]
    for words in (*written, ["merge", patch, "--out", patch], ["export", "mine", patch, "--to", "hf"]):
        assert "expected a place on this machine to write to; got hub:" in said(*words, status=2)
    assert not list(tmp_path.glob("hub:*"))
    with pytest.raises(InputError, match="expected a place on this machine"):
        save_stack(stack, model, patches)


def test_a_stack_of_the_hub_is_served_and_not_changed(hub, model, patches, tmp_path):
    stack = shared_as(hub, "mine", save_stack(tmp_path / "s", model, patches[:1]), base=model)
    lm, folders = LM(model), stack_names([Path(stack)], "base")
    served = Stacks(model, "base", lm.fingerprint, folders, lambda _patches: None, fixed=["mine"])
    assert served.names == ["base", "mine"] and list(served.patches("mine")) == patches[:1]
    for change in (lambda: served.add("mine", patches[1]), lambda: served.remove("mine", patches[0].id)):
        with pytest.raises(PatchError, match="mine is read from the hub: pull it, and serve the folder"):
            change()
