"""Stacks that are served: what their folders have now, and changes that are whole."""

from __future__ import annotations

import os

import pytest

from conftest import saved, some_patch
from kills import run
from reknow import LM
from reknow.errors import InputError, PatchError
from reknow.patching.stack import read_history, read_stack, save_stack
from reknow.serving.stacks import Stacks, UnknownStack, stack_names


@pytest.fixture
def model(tmp_path) -> str:
    return saved(tmp_path / "model", "gpt2")


@pytest.fixture
def base(model) -> LM:
    return LM(model)


def served(base: LM, folder, *names: str, check=lambda _patches: None) -> Stacks:
    folders = stack_names([folder / name for name in names], "base")
    return Stacks(base.name, "base", base.fingerprint, folders, check)


def test_a_patch_goes_on_and_comes_off_and_the_folder_and_its_history_say_so(base, tmp_path):
    stacks, patch = served(base, tmp_path, "alice", "bob"), some_patch(base)
    assert stacks.names == ["base", "alice", "bob"] and stacks.patches("alice") == ()
    assert stacks.add("alice", patch, "asked for") == stacks.patches("alice") == (patch,)
    assert stacks.patches("bob") == stacks.patches("base") == ()
    assert read_stack(tmp_path / "alice") == (base.name, [patch])
    with pytest.raises(PatchError, match="not applied yet"):
        stacks.add("alice", patch)
    assert stacks.remove("alice", patch.id, "wrong") == stacks.patches("alice") == ()
    entries = [line.entry for line in read_history(tmp_path / "alice")]
    assert [(entry.action, entry.why) for entry in entries] == [("apply", "asked for"), ("revert", "wrong")]


def test_what_other_programs_write_is_seen(base, tmp_path):
    stacks, patches = served(base, tmp_path, "alice"), [some_patch(base, seed) for seed in (1, 2)]
    stacks.add("alice", patches[0])
    save_stack(tmp_path / "alice", base.name, patches)
    assert stacks.patches("alice") == tuple(patches)
    assert stacks.patches("alice") is stacks.patches("alice"), "read once"
    save_stack(tmp_path / "alice", "demo:llama", patches[:1])
    with pytest.raises(PatchError, match="demo:llama"):
        stacks.patches("alice")


def test_a_folder_that_is_gone_is_no_empty_stack(base, tmp_path):
    patch = some_patch(base)
    save_stack(tmp_path / "alice", base.name, [patch])
    for read_before in (True, False):
        stacks = served(base, tmp_path, "alice", "new")
        if read_before:
            assert stacks.patches("alice") == (patch,)
        (tmp_path / "alice").rename(tmp_path / "away")
        with pytest.raises(UnknownStack, match="it is gone since it was served"):
            stacks.patches("alice")
        with pytest.raises(UnknownStack, match="it is gone since it was served"):
            stacks.add("alice", some_patch(base, 2))
        assert stacks.patches("new") == () and not (tmp_path / "alice").exists()
        (tmp_path / "away").rename(tmp_path / "alice")
        assert stacks.patches("alice") == (patch,)


def test_a_patch_that_does_not_fit_changes_nothing(base, tmp_path):
    def refuse(_patches):
        raise PatchError("expected a matrix that is there")

    stacks = served(base, tmp_path, "alice", check=refuse)
    with pytest.raises(PatchError, match="matrix"):
        stacks.add("alice", some_patch(base))
    assert stacks.patches("alice") == () and not (tmp_path / "alice").exists()
    other = LM(saved(tmp_path / "other", "llama"))
    with pytest.raises(PatchError, match="base"):
        served(base, tmp_path, "alice").add("alice", some_patch(other))


def test_unknown_names_are_refused_with_those_that_there_are(base, tmp_path):
    stacks = served(base, tmp_path, "alice", "bob")
    with pytest.raises(UnknownStack, match=r"'carol': there are alice, bob, and base without patches$"):
        stacks.patches("carol")
    for change in (lambda: stacks.add("base", some_patch(base)), lambda: stacks.remove("base", "a")):
        with pytest.raises(UnknownStack, match=r"there are alice, bob$"):
            change()
    for folders in ([tmp_path / "a", tmp_path / "b" / "a"], [tmp_path / "base"]):
        with pytest.raises(InputError, match="name of its own"):
            stack_names(folders, "base")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are copied the Unix way")
def test_a_kill_at_any_step_of_a_change_leaves_the_stack_whole(base, tmp_path):
    patches = [some_patch(base, seed) for seed in (1, 2)]
    stacks = served(base, tmp_path, "alice", "bob")
    stacks.add("alice", patches[0])
    other = stacks.add("bob", patches[1])
    changes = {
        (patches[0], patches[1]): lambda: stacks.add("alice", patches[1]),
        (): lambda: stacks.remove("alice", patches[0].id),
    }
    killed = 0
    for after, change in changes.items():
        kill_at = 1
        while run(change, kill_at) < 0:
            base_there, found = read_stack(tmp_path / "alice")
            assert base_there == base.name and tuple(found) in ((patches[0],), after)
            assert all(line.problem is None for line in read_history(tmp_path / "alice"))
            assert stacks.patches("bob") == other
            save_stack(tmp_path / "alice", base.name, patches[:1])
            kill_at, killed = kill_at + 1, killed + 1
        assert stacks.patches("alice") == after
        save_stack(tmp_path / "alice", base.name, patches[:1])
    assert killed > 20
