"""`verify` and `check` answer with their status, and name what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import saved, some_patch
from reknow import LM, Edit, Patch, method
from reknow.cli import app
from reknow.patching.history import HISTORY_FILE
from reknow.patching.stack import save_stack

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, list[Patch]]:
    """A tiny model in a folder, and two patches that it follows."""
    model = saved(tmp_path_factory.mktemp("model"), "gpt2")
    lm = LM(model)
    for prompt, subject, new in (("{} speaks", "Zoë Übel", "French"), ("The capital of {}", "Peru", "Paris")):
        edit = Edit(prompt, subject=subject, target_new=new)
        lm.apply(method("ft-m", layer=2, steps=200).edit(lm, [edit]))
    return model, list(lm.patches)


@pytest.fixture
def stack(made) -> Path:
    model, patches = made
    save_stack("mine", model, patches[:1], action="apply")
    return save_stack("mine", model, patches, action="apply")


def status(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout


def test_a_stack_as_it_should_be(stack):
    code, said = status("verify", stack)
    assert code == 0 and "files: every patch is there and as it was applied\n" in said
    assert "history: 2 lines, each as it was written, the last is " in said
    assert said.endswith("base: the model on which the patches were made\nedits: 2 of 2 answered as wanted\n")
    code, said = status("verify", stack, "--json")
    found = json.loads(said)
    assert code == 0 and found["sound"] and [one["said"] for one in found["edits"]] == [True, True]


def test_a_tampered_line_is_named_and_the_rest_still_examined(stack):
    file = stack / HISTORY_FILE
    file.write_text(file.read_text().replace('"why": ""', '"why": "agreed"', 1))
    code, said = status("verify", stack)
    assert code == 1 and "history: line 1 of the history: its text is not the one of which it holds the hash" in said
    assert "edits: 2 of 2 answered as wanted" in said
    assert json.loads(status("verify", stack, "--json")[1])["sound"] is False


@pytest.mark.parametrize("damage", ["gone", "damaged", "another", "other notes"])
def test_files_that_are_not_what_was_applied_are_named(stack, made, damage):
    first, second = made[1]
    file = stack / f"{first.id}.patch"
    if damage == "gone":
        file.unlink()
    elif damage == "damaged":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "another":
        second.save(file)
    else:
        changed = Patch.load(file)
        changed.notes["agreed"] = True
        changed.save(file)
    code, said = status("verify", stack)
    assert code == 1 and said.count("files: ") == 1 and first.id in said.splitlines()[0]
    assert ("in other bytes than when it was applied" in said) is (damage == "other notes")
    assert said.endswith("base: not asked\nedits: not asked\n")


def test_a_base_that_is_another_is_named(stack, made, tmp_path):
    other = saved(tmp_path / "other", "gpt2", seed=1)
    text = (stack / "stack.json").read_text()
    (stack / "stack.json").write_text(text.replace(json.dumps(made[0]), json.dumps(other), 1))
    code, said = status("verify", stack)
    assert code == 1 and "base: expected the base model on which" in said and "edits: not asked" in said


def test_an_edit_that_is_not_said_any_more_is_named(stack, made):
    model, patches = made
    wrecking = some_patch(LM(str(stack)), size=30.0)
    save_stack(stack, model, [*patches, wrecking], action="apply")
    code, said = status("verify", stack)
    assert code == 1 and "edits: The capital of Land 0 is → Lima is not said any more" in said
    code, said = status("check", stack)
    assert code == 1 and "beyond its limits in " in said and "in_force" in said.splitlines()[-1]


@pytest.mark.slow
def test_limits_decide(stack):
    Path("loose.toml").write_text("perplexity_ratio = inf\nkl = inf\nothers_kept = 0\nnorm = inf\n")
    code, said = status("check", stack, "--limits", "loose.toml")
    assert code == 0 and said.endswith("mine: all limits are kept\n")
    Path("strict.toml").write_text("edits = 1\nperplexity_ratio = inf\nkl = inf\nothers_kept = 0\nnorm = inf\n")
    code, said = status("check", stack, "--limits", "strict.toml")
    assert code == 1 and said.endswith("mine: beyond its limits in edits\n")
    found = json.loads(status("check", stack, "--limits", "strict.toml", "--json")[1])
    assert [row["name"] for row in found["limits"] if not row["kept"]] == ["edits"]
    assert found["health"]["edits"] == 2 and found["health"]["in_force"] == 1.0


@pytest.mark.parametrize("command", ["verify", "check", "log"])
def test_what_is_no_stack_is_refused(command, tmp_path):
    result = CliRunner().invoke(app, [command, str(tmp_path)])
    assert result.exit_code == 2 and "expected a stack folder at" in result.stderr
