"""The history of a stack: who, when, why; chained, so that a changed line is named; whole, however a process ends."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from conftest import make_lm, some_patch
from kills import run
from reknow import Patch, method
from reknow.cli import app
from reknow.errors import InputError, PatchError
from reknow.files.outputs import STACK_FILE
from reknow.patching.history import AUTHOR, HISTORY_FILE, find_line
from reknow.patching.stack import patches_at, read_history, read_stack, save_stack

UNIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are copied the Unix way")


@pytest.fixture(scope="module")
def patches() -> list[Patch]:
    lm = make_lm("gpt2")
    return [some_patch(lm, seed) for seed in range(4)]


@pytest.fixture
def stack(tmp_path, patches, monkeypatch) -> Path:
    """One patch, another, and the first taken out again."""
    monkeypatch.setenv(AUTHOR, "Zoë")
    one, two, *_ = patches
    folder = save_stack(tmp_path / "stack", "base", [one], action="apply", why="ticket 12")
    save_stack(folder, "base", [one, two], action="apply")
    return save_stack(folder, "base", [two], action="revert", why="it was\nwrong: “→”")


def problems(stack: Path) -> list[tuple[int, str]]:
    return [(line.number, line.problem) for line in read_history(stack) if line.problem]


def states(stack: Path) -> list[list[str]]:
    return [line.entry.patches for line in read_history(stack)]


def write_lines(stack: Path, lines: list[str]) -> None:
    (stack / HISTORY_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_lines(stack: Path) -> list[str]:
    return (stack / HISTORY_FILE).read_text(encoding="utf-8").split("\n")[:-1]


def test_who_when_why_and_what(stack, patches):
    one, two, *_ = patches
    first, second, third = (line.entry for line in read_history(stack))
    assert [entry.number for entry in (first, second, third)] == [1, 2, 3]
    assert [entry.action for entry in (first, second, third)] == ["apply", "apply", "revert"]
    assert [entry.why for entry in (first, second, third)] == ["ticket 12", "", "it was\nwrong: “→”"]
    assert {entry.by for entry in (first, second, third)} == {"Zoë"}
    assert all(abs(datetime.now(timezone.utc) - entry.at) < timedelta(minutes=5) for entry in (first, third))
    assert [one.what for one in first.applied] == ["rome: The capital of Land 0 is → Lima"]
    assert third.reverted == [one.id] and third.applied == [] and third.patches == [two.id]
    assert first.previous is None and second.previous == first.hash and third.previous == second.hash
    assert first.found is second.found is third.found is None
    assert problems(stack) == [] and len(read_lines(stack)) == 3


def test_what_changes_nothing_is_no_change(stack, patches):
    save_stack(stack, "base", [patches[1]], why="again")
    assert len(read_lines(stack)) == 3


def test_a_text_that_no_file_takes_is_refused_before_anything_is_written(tmp_path, patches):
    with pytest.raises(InputError, match="expected why as text that can be encoded"):
        save_stack(tmp_path / "stack", "base", patches[:1], why="\udc80")
    assert not (tmp_path / "stack").exists()


# --- stacks from before ----------------------------------------------------------------------------------------


def test_a_stack_without_a_history_opens_as_before_and_begins_one(tmp_path, patches):
    one, two, *_ = patches
    folder = tmp_path / "stack"
    folder.mkdir()
    one.save(folder / f"{one.id}.patch")
    old = {"format": 1, "base": "base", "patches": [f"{one.id}.patch"]}
    (folder / STACK_FILE).write_text(json.dumps(old))
    assert read_stack(folder) == ("base", [one]) and read_history(folder) == []
    save_stack(folder, "base", [one, two], action="apply")
    (line,) = read_history(folder)
    assert line.problem is None and line.entry.found == [one.id] and line.entry.patches == [one.id, two.id]


def test_a_stack_that_an_older_version_wrote_meanwhile_goes_on_and_says_so(stack, patches):
    old = {"format": 1, "base": "base", "patches": []}
    (stack / STACK_FILE).write_text(json.dumps(old))
    ((number, problem),) = problems(stack)
    assert number == 3 and "does not name it as the last one" in problem
    save_stack(stack, "base", patches[2:3], action="apply")
    assert problems(stack) == [] and read_history(stack)[-1].entry.found == []


# --- what does not fit is named ----------------------------------------------------------------------------------


def test_a_changed_line_is_named(stack):
    lines = read_lines(stack)
    for number, line in enumerate(lines, 1):
        write_lines(stack, [*lines[: number - 1], line.replace('"by": "Zoë"', '"by": "Ann"'), *lines[number:]])
        named = problems(stack)
        assert named[0][0] == number and "it was changed" in named[0][1], number
        if number < 3:
            assert len(named) == 1
    write_lines(stack, lines)
    assert problems(stack) == []


def resealed(line: str, **changes) -> str:
    """The line with other values and the hash that fits them, as somebody who knows how would forge it."""
    import hashlib

    body = json.loads(line) | changes
    body.pop("hash")
    text = json.dumps(body, ensure_ascii=False)
    return f'{text[:-1]}, "hash": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def test_a_line_that_was_forged_does_not_fit_the_next_one(stack):
    lines = read_lines(stack)
    write_lines(stack, [lines[0], resealed(lines[1], why="as agreed"), lines[2]])
    ((number, problem),) = problems(stack)
    assert number == 3 and "it was not written behind line 2 as that is now" in problem
    write_lines(stack, [*lines[:2], resealed(lines[2], by="Ann")])
    ((number, problem),) = problems(stack)  # the last one is in stack.json too
    assert number == 3 and "stack.json names another line than this one" in problem


@pytest.mark.parametrize(
    ("which", "named"),
    [([1, 2], 1), ([0, 2], 2), ([0, 0, 1, 2], 2), ([1, 0, 2], 1), ([0, 2, 1], 2)],
    ids=["the first gone", "one gone", "one twice", "two swapped", "the last ones swapped"],
)
def test_lines_that_are_gone_twice_or_moved_are_named(stack, which, named):
    lines = read_lines(stack)
    write_lines(stack, [lines[i] for i in which])
    assert problems(stack)[0][0] == named


@pytest.mark.parametrize("text", ["", "{}", "null", "[" * 300, '{"number": 2}', "\ufffd"])
def test_a_line_that_is_none_is_named(stack, text):
    lines = read_lines(stack)
    write_lines(stack, [lines[0], text, lines[2]])
    ((number, problem),) = problems(stack)
    assert number == 2 and "it is no line of a history" in problem


def test_bytes_that_are_no_text_are_named(stack):
    content = (stack / HISTORY_FILE).read_bytes()
    (stack / HISTORY_FILE).write_bytes(content.replace("“→”".encode(), b"\xff", 1))
    assert problems(stack)[0][0] == 3


def test_patches_that_the_history_does_not_know_are_named(stack, patches):
    content = json.loads((stack / STACK_FILE).read_text())
    (stack / STACK_FILE).write_text(json.dumps({**content, "patches": []}))
    ((number, problem),) = problems(stack)
    assert number == 3 and "not by reknow" in problem
    save_stack(stack, "base", [patches[3]], action="apply")
    assert problems(stack) == [] and read_history(stack)[-1].entry.found == []


@pytest.mark.parametrize("lost", ["the file", "its last two lines", "the content of its last line"])
def test_nothing_is_written_onto_another_history(stack, patches, lost):
    lines = read_lines(stack)
    file = stack / HISTORY_FILE
    if lost == "the file":
        file.unlink()
    else:
        write_lines(stack, lines[:1] if lost == "its last two lines" else [*lines[:2], "{}"])
    before = {path.name: path.read_bytes() for path in stack.iterdir() if path.suffix != ".patch"}
    with pytest.raises(PatchError, match="to end with the line that stack"):
        save_stack(stack, "base", patches[:1], action="apply")
    assert {path.name: path.read_bytes() for path in stack.iterdir() if path.suffix != ".patch"} == before
    file.unlink(missing_ok=True)
    content = json.loads((stack / STACK_FILE).read_text())
    del content["last"]
    (stack / STACK_FILE).write_text(json.dumps(content))
    save_stack(stack, "base", patches[:1], action="apply")
    assert len(read_history(stack)) == 1 and problems(stack) == []


# --- back to what it was -----------------------------------------------------------------------------------------


def test_back_to_a_line_a_patch_or_a_time(stack, patches):
    one, two, *_ = patches
    first, second, third = read_history(stack)
    assert find_line([first, second, third], first.id[:6]) == first
    assert find_line([first, second, third], two.id) == second
    assert patches_at(stack, second.id) == (second, [one, two])
    assert patches_at(stack, third.entry.at.isoformat())[0] == third
    assert patches_at(stack, f"{third.entry.at:%Y-%m-%dT%H:%M:%SZ}")[0] == third
    with pytest.raises(InputError, match="is before its first line"):
        patches_at(stack, "2020-01-01")
    for wrong in ("abc", "yesterday", "zzzzzz", ""):
        with pytest.raises(InputError, match="expected the id of a line of the history or of a patch, or a time"):
            patches_at(stack, wrong)
    (stack / f"{one.id}.patch").unlink()
    with pytest.raises(PatchError, match="no such file"):
        patches_at(stack, second.id)


# --- processes that end anywhere ---------------------------------------------------------------------------------


def sound(stack: Path) -> list[str]:
    """Ids of the patches of a stack; its history must be whole and say the same."""
    active = [patch.id for patch in read_stack(stack)[1]] if (stack / STACK_FILE).exists() else []
    if (stack / STACK_FILE).exists():
        assert problems(stack) == []
        assert states(stack)[-1:] == [active] or not states(stack)
    return active


def changes(patches: list[Patch]) -> dict[str, tuple[list[list[Patch]], Callable[[Path], object]]]:
    """The states that a stack has had before, and what is done to it then."""
    one, two, three, _ = patches
    return {
        "a new stack": ([], lambda stack: save_stack(stack, "base", [one], action="apply")),
        "apply": ([[one], [one, two]], lambda stack: save_stack(stack, "base", [one, two, three], action="apply")),
        "revert": ([[one, two]], lambda stack: save_stack(stack, "base", [two], action="revert", why="wrong")),
        "back": (
            [[one, two], []],
            lambda stack: save_stack(stack, "base", patches_at(stack, two.id)[1], action="revert", to="x"),
        ),
    }


@UNIX
@pytest.mark.slow
@pytest.mark.parametrize("name", ["a new stack", "apply", "revert", "back"])
def test_a_change_that_is_killed_at_any_step_is_made_once_or_not_at_all(tmp_path, patches, name):
    before, action = changes(patches)[name]
    stack, copy = tmp_path / "stack", tmp_path / "before"
    for state in before:
        save_stack(stack, "base", state)
    if before:
        shutil.copytree(stack, copy)
    old = sound(stack)
    steps = run(lambda: action(stack))
    new = sound(stack)
    assert old != new and steps > 20
    for number in range(1, steps + 1):
        shutil.rmtree(stack)
        if before:
            shutil.copytree(copy, stack)
        assert run(lambda: action(stack), number) == -signal.SIGKILL
        made = sound(stack)
        assert made in (old, new), number
        if number % 2:  # the same again, or something else, by the next process
            run(lambda: action(stack))
            assert sound(stack) == new and len(read_lines(stack)) == len(before) + 1, number
        else:
            run(lambda: save_stack(stack, "base", [patches[3]], action="apply"))
            assert sound(stack) == [patches[3].id], number
            assert len(read_lines(stack)) == len(before) + 1 + (made == new), number


@UNIX
@pytest.mark.slow
def test_commands_that_are_killed_at_any_time_lose_nothing_and_do_nothing_twice(tmp_path, patches):
    """A hundred commands are killed, each at another moment, and given again until they succeed."""
    lm, stack = make_lm("gpt2"), tmp_path / "stack"
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    files = {patch.id: str(patch.save(tmp_path / f"{patch.id}.file")) for patch in patches}
    save_stack(stack, str(tmp_path / "model"), [patches[0]])
    rng, kills, done = random.Random(0), 0, Counter[tuple[str, str]]()
    longest = 0.5
    while kills < 100:
        active = sound(stack)
        wanted = rng.choice(patches[1:]).id
        verb = "revert" if wanted in active else "apply"
        words = [verb, wanted if verb == "revert" else files[wanted], "--stack", str(stack), "--why", "a kill test"]
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                app(words)
            except SystemExit as end:
                os._exit(int(end.code or 0))
            os._exit(1)
        started = time.monotonic()
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        if not os.WIFSIGNALED(status):  # it was done before
            longest = 0.9 * longest + 0.1 * min(longest, 1.5 * (time.monotonic() - started))
        kills += os.WIFSIGNALED(status)
        now = sound(stack)
        changed = [*active, wanted] if verb == "apply" else [one for one in active if one != wanted]
        assert now in (active, changed)
        assert os.WIFSIGNALED(status) or now == changed
        done[verb, wanted] += now == changed
    found = Counter[tuple[str, str]]()
    for line in read_history(stack)[1:]:
        found.update([("apply", one.id) for one in line.entry.applied])
        found.update([("revert", one) for one in line.entry.reverted])
        assert line.entry.why == "a kill test"
    assert found == +done and sum(found.values()) > 5


@pytest.mark.parametrize("left", [0, 1, 40, -1])
def test_a_line_that_was_torn_is_written_again(stack, patches, left):
    """As a machine that loses its power may leave it: `stack.json` has been written, the line only in part."""
    lines = read_lines(stack)
    text = "".join(f"{line}\n" for line in lines[:2]) + lines[2][: left if left >= 0 else None]
    (stack / HISTORY_FILE).write_text(text, encoding="utf-8")
    assert problems(stack) == [] and len(read_history(stack)) == 3
    save_stack(stack, "base", [patches[3]], action="apply")
    assert problems(stack) == [] and read_lines(stack)[:3] == lines and len(read_lines(stack)) == 4


def test_a_memory_that_is_rebuilt(tmp_path):
    lm = make_lm("gpt2")
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    edits = [some_patch(lm, seed).edits[0] for seed in (1, 2)]
    grace = method("grace", layer=1, steps=1)
    for edit in edits:
        lm.apply(grace.edit(lm, [edit]))
    first, second = lm.patches
    stack = save_stack(tmp_path / "stack", str(tmp_path / "model"), lm.patches)
    with pytest.raises(SystemExit) as end:
        app(["revert", first.id, "--stack", str(stack), "--rebuild", "--why", "not needed"])
    assert end.value.code == 0 and problems(stack) == []
    entry = read_history(stack)[-1].entry
    assert (entry.action, entry.why, entry.reverted) == ("rebuild", "not needed", [first.id, second.id])
    assert [one.id for one in entry.applied] == [patch.id for patch in read_stack(stack)[1]]


def test_a_history_is_told(stack, patches, capsys):
    def said(*words: object) -> tuple[str, str]:
        with pytest.raises(SystemExit) as end:
            app([str(word) for word in words])
        assert end.value.code == 0
        return capsys.readouterr()

    first, second, third = read_history(stack)
    out, err = said("log", stack)
    assert err == "" and [line for line in out.splitlines() if line.startswith(f" {second.id}")]
    assert "ticket 12" in out and f"− {patches[0].id}" in out and "Zoë" in out
    out, _ = said("log", stack, "--json")
    assert [entry["hash"][:12] for entry in json.loads(out)] == [first.id, second.id, third.id]
    out, _ = said("revert", "--to", first.id, "--stack", stack, "--why", "back")
    assert f"applied {patches[0].label}" in out and f"reverted {patches[1].label}" in out
    assert f"as after line 1, {first.id}" in out and read_history(stack)[-1].entry.to == first.id
    write_lines(stack, [resealed(line, by="Ann") if i == 1 else line for i, line in enumerate(read_lines(stack))])
    assert "warning: line 3 of the history: it was not written behind line 2" in said("log", stack)[1]
