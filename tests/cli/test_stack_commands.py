"""Commands on stack folders: a stack on a stack, lines that are to be pasted, changes of a damaged history."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import saved, some_patch
from reknow import LM, Patch
from reknow.cli import app
from reknow.errors import InputError
from reknow.patching.history import AUTHOR, HISTORY_FILE
from reknow.patching.stack import read_history, read_stack, save_stack

pytestmark = pytest.mark.usefixtures("empty_folder")
QUICK = ["--method", "ft-m", "--set", "steps=1", "--set", "layer=1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, list[Patch]]:
    """A tiny model in a folder, and patches of it."""
    model = saved(tmp_path_factory.mktemp("model"), "gpt2")
    lm = LM(model)
    return model, [some_patch(lm, seed) for seed in range(3)]


@pytest.fixture
def stack(made, monkeypatch) -> Path:
    """A stack of two patches, put on one by one."""
    monkeypatch.setenv(AUTHOR, "Zoë")
    model, patches = made
    save_stack("alice", model, patches[:1], action="apply")
    return save_stack("alice", model, patches[:2], action="apply")


def reknow(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def ids(folder: str | Path) -> list[str]:
    return [patch.id for patch in LM(str(folder)).patches]


# --- a stack on a stack --------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_new_stack_on_a_stack_begins_with_its_patches(stack, made, force):
    model, (one, two, three) = made
    three.save("new.patch")
    result = reknow("apply", "new.patch", "--stack", "fold", "--model", "alice", *force)
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"fold begins with what alice has: 2 patches\napplied {three.label}\nfold: {model} with 3 patches\n"
    )
    assert ids("fold") == [one.id, two.id, three.id] and read_stack("fold")[0] == model
    assert ids("alice") == [one.id, two.id]
    assert [applied.id for applied in read_history("fold")[0].entry.applied] == ids("fold")


def test_a_stack_is_no_base(stack, made):
    for base in ("alice", str(stack.resolve()), "hub:zoe/alice"):
        with pytest.raises(InputError, match=r"expected a base model; .*alice is a stack"):
            save_stack("fold", base, made[1][2:])
    assert not Path("fold", "stack.json").exists()


def test_a_stack_whose_base_is_a_stack_says_how_to_make_it_anew(stack, made):
    made[1][2].save("new.patch")
    assert reknow("apply", "new.patch", "--stack", "fold", "--model", made[0]).exit_code == 0
    file = Path("fold", "stack.json")
    file.write_text(file.read_text().replace(f'"base": "{made[0]}"', '"base": "alice"', 1))
    result = reknow("ask", "Peru", "--stack", "fold")
    assert result.exit_code == 2 and result.stderr == (
        "error: expected a folder that transformers saved; alice is a stack of patches, which is no base model: "
        "`reknow apply PATCH --stack NEW --model alice` makes one that begins with what is there\n"
    )
    assert reknow("apply", "new.patch", "--stack", "new", "--model", "alice").exit_code == 0


@pytest.mark.parametrize(
    "command", [["edit", "The capital of {Peru} is", "Paris"], ["erase", "The capital of {Peru}"]]
)
@pytest.mark.parametrize("source", ["model", "alice", "a stack"])
def test_the_line_that_a_command_prints_makes_what_opens(stack, made, command, source):
    if source == "a stack":
        stack.rename(source)
    words = [*command, "--model", made[0] if source == "model" else source, *QUICK, "--out", "my own.patch"]
    result = reknow(*words, *(["--old", "Lima"] if command[0] == "erase" else []))
    assert result.exit_code == 0, result.output
    line = shlex.split(result.stdout.splitlines()[-1].partition("apply it with: reknow ")[2])
    where = ["FOLDER", "--model", made[0]] if source == "model" else [source]
    assert line == ["apply", "my own.patch", "--stack", *where]
    result = reknow(*line)
    assert result.exit_code == 0, result.output
    assert ids(where[0])[-1] == Patch.load("my own.patch").id


# --- what changes nothing, and what changes an order ----------------------------------------------------------


@pytest.mark.parametrize("to", ["line", "patch", "time"])
def test_going_back_to_what_is_there_says_that_there_is_nothing_to_do(stack, to):
    last = read_history(stack)[-1]
    wanted = {"line": last.id, "patch": ids(stack)[-1], "time": "2999-01-01"}[to]
    result = reknow("revert", "--to", wanted, "--stack", stack, "--why", "back")
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    assert result.stdout.startswith(f"nothing to do, so nothing is noted: alice is as after line 2, {last.id}, of ")
    assert len(read_history(stack)) == 2


def test_another_order_is_said_and_logged(stack, made):
    model, (one, two, three) = made
    save_stack(stack, model, [two, three, one])
    result = reknow("revert", "--to", read_history(stack)[1].id, "--stack", stack)
    order = f"reordered: {one.id}, {two.id}, the newest last\n"
    assert f"reverted {three.label}\n{order}as after line 2, " in result.stdout
    logged = " ".join(reknow("log", stack).stdout.split())
    assert logged.count("reordered: ") == 2 and f"− {three.id}" in logged
    save_stack(stack, model, [two, one])
    result = reknow("revert", "--to", read_history(stack)[1].id, "--stack", stack)
    assert result.stdout.startswith(order)
    reknow("revert", one.id, "--stack", stack)
    assert reknow("log", stack).stdout.count("reordered: ") == 4, "what is taken out of the middle leaves the order"


def test_another_base_is_logged(stack, made):
    save_stack(stack, "another/base", made[1][:2])
    assert "base: another/base" in reknow("log", stack).stdout


# --- a history that is not as it was written -------------------------------------------------------------------


def tamper(stack: Path, number: int = 1) -> None:
    """Gives a line of the history another reason, as an editor would."""
    file = stack / HISTORY_FILE
    lines = file.read_text(encoding="utf-8").split("\n")
    lines[number - 1] = lines[number - 1].replace('"why": ""', '"why": "agreed"')
    file.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("words", ["apply", "revert", "rebuild", "back", "nothing"])
def test_who_changes_a_stack_with_a_changed_line_is_told_once(stack, made, words):
    _, two, three = made[1]
    three.save("new.patch")
    tamper(stack)
    line = {
        "apply": ["apply", "new.patch"],
        "revert": ["revert", two.id],
        "rebuild": ["revert", two.id, "--rebuild"],
        "back": ["revert", "--to", read_history(stack)[0].id],
        "nothing": ["revert", "--to", read_history(stack)[1].id],
    }[words]
    result = reknow(*line, "--stack", stack)
    assert result.exit_code == 0, result.output
    assert result.stderr == (
        "warning: line 1 of the history of alice: its text is not the one of which it holds the hash: it was changed"
        "; changes are made all the same, `reknow verify alice` examines all\n"
    )
    assert len(read_history(stack)) == (2 if words == "nothing" else 3) and not read_history(stack)[-1].problem


def test_a_sound_history_is_no_warning(stack, made):
    made[1][2].save("new.patch")
    assert reknow("apply", "new.patch", "--stack", stack).stderr == ""
    assert reknow("revert", made[1][2].id, "--stack", stack).stderr == ""


def test_a_changed_last_line_is_refused_in_one_line(stack, made):
    made[1][2].save("new.patch")
    tamper(stack, 2)
    result = reknow("apply", "new.patch", "--stack", stack)
    assert result.exit_code == 2 and result.stderr.startswith("error: expected ") and result.stderr.count("\n") == 1


def test_several_lines_are_one_warning(stack, made):
    model, patches = made
    save_stack(stack, model, patches)
    tamper(stack, 1), tamper(stack, 2)
    result = reknow("revert", patches[2].id, "--stack", stack)
    assert result.exit_code == 0 and result.stderr.count("\n") == 1
    assert "line 1 of the history" in result.stderr and "it was changed (and 1 more); changes" in result.stderr
