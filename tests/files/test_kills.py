"""A process killed at any step of writing leaves what was there or the whole of the new, and the next one goes on."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import reknow.files.atomic
from conftest import make_lm, some_patch
from gguf_models import write_gguf
from kills import run
from reknow import LM, Patch
from reknow.cli.stacks import merge
from reknow.export import gguf_model
from reknow.export.adapter import export_lora
from reknow.export.checkpoint import export_checkpoint
from reknow.export.gguf_adapter import export_gguf_lora
from reknow.export.measure import Answer
from reknow.files.atomic import HIDDEN, restore_interrupted, write_text
from reknow.methods import method
from reknow.patching.stack import read_stack, save_stack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are copied the Unix way"),
]


def contents(place: Path) -> dict[str, bytes]:
    """The files at a path, and their bytes; nothing where nothing is."""
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    return {path.relative_to(place.parent).as_posix(): path.read_bytes() for path in sorted(files)}


def check(folder: Path, place: Path, action: Callable[[], object], look=restore_interrupted) -> int:
    """Kills the action at every step: what is at `place` is as before or as afterwards, and then it succeeds."""
    before = folder.with_name("before")
    shutil.copytree(folder, before)
    old = contents(place)
    steps = run(action)
    new = contents(place)
    assert old != new and steps > 3
    for number in range(1, steps + 1):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        assert run(action, number) == -signal.SIGKILL
        look(place)
        assert contents(place) in (old, new), number
        run(action)
        assert contents(place) == new, number
        assert not [name for name in os.listdir(folder) if name.startswith(HIDDEN)], number
    return steps


@dataclass
class Scene:
    """A folder with something in it, and what replaces that."""

    folder: Path
    lm: LM
    patches: list[Patch]


@pytest.fixture
def scene(tmp_path) -> Scene:
    base, lm = tmp_path / "base", make_lm("llama", num_hidden_layers=2)
    lm.model.save_pretrained(base)
    lm.tokenizer.save_pretrained(base)
    lm = LM(base)
    (tmp_path / "there").mkdir()
    return Scene(tmp_path / "there", lm, [some_patch(lm, 1), some_patch(lm, 2)])


def test_a_text_and_a_patch(scene):
    one, two = scene.patches
    place = scene.folder / "a.patch"
    one.save(place)
    check(scene.folder, place, lambda: two.save(place))
    place = scene.folder / "a.txt"
    shutil.rmtree(scene.folder.with_name("before"))
    write_text(place, "old")
    check(scene.folder, place, lambda: write_text(place, "new"))


def test_merge(scene):
    names = [patch.save(scene.folder / f"{number}.patch") for number, patch in enumerate(scene.patches)]
    place = scene.folder / "both.patch"
    scene.patches[0].save(place)
    check(scene.folder, place, lambda: merge(names, place, force=True))


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
def test_the_folder_of_an_adapter_patch(scene, exchange, monkeypatch):
    one, two = (method("lora", layers=(1,), steps=n).edit(scene.lm, scene.patches[0].edits) for n in (1, 2))
    place = one.save(scene.folder / "tuned")
    gone = []

    def look(place: Path) -> None:
        gone.append(not place.exists())
        assert Patch.load(place).id in (one.id, two.id)  # which puts it back first

    if not exchange:
        monkeypatch.setattr("reknow.files.atomic._exchange", lambda *_: False)
    check(scene.folder, place, lambda: two.save(place), look)
    assert any(gone) is not exchange


@pytest.fixture
def at_one_moment(monkeypatch):
    """Exports that are made twice say the same."""
    monkeypatch.setattr("reknow.export.about.now", lambda: "now")


@pytest.mark.usefixtures("at_one_moment")
@pytest.mark.parametrize(
    ("export", "exchange"),
    [(export_checkpoint, True), (export_lora, False), (export_gguf_lora, True)],
    ids=["a checkpoint, in one step", "an adapter, in two", "an adapter for llama.cpp, in one"],
)
def test_an_export(scene, export, exchange, monkeypatch):
    scene.lm.apply(scene.patches[0])
    export(scene.lm, scene.folder / "out")
    scene.lm.apply(scene.patches[1])
    if not exchange:
        monkeypatch.setattr("reknow.files.atomic._exchange", lambda *_: False)
    check(scene.folder, scene.folder / "out", lambda: export(scene.lm, scene.folder / "out", overwrite=True))


@pytest.mark.usefixtures("at_one_moment")
def test_a_gguf_file(scene, tmp_path, monkeypatch):
    """It takes its place whole, with what it was asked; the file that it was made of stays as it is."""
    base, out = write_gguf(scene.lm, tmp_path / "base.gguf", "Q4_0"), scene.folder / "out.gguf"
    scene.lm.apply(scene.patches[0])
    monkeypatch.setattr(gguf_model, "_ask_file", lambda _, __, measured: [Answer(0.5, True)] * len(measured.edits))
    gguf_model.export_gguf(scene.lm, base, out)
    scene.lm.apply(scene.patches[1])
    before = base.read_bytes()
    steps = check(scene.folder, out, lambda: gguf_model.export_gguf(scene.lm, base, out, overwrite=True))
    assert steps > 50 and base.read_bytes() == before


def test_a_stack(scene):
    """Its list is the last to be written, so that what is named there is there."""
    one, two = scene.patches
    place = save_stack(scene.folder / "stack", "base", [one])
    before = scene.folder.with_name("before")
    shutil.copytree(scene.folder, before)

    def action() -> None:
        save_stack(place, "base", [one, two])

    for number in range(1, run(action) + 1):
        shutil.rmtree(scene.folder)
        shutil.copytree(before, scene.folder)
        assert run(action, number) == -signal.SIGKILL
        assert [patch.id for patch in read_stack(place)[1]] in ([one.id], [one.id, two.id]), number
        run(action)
        assert [patch.id for patch in read_stack(place)[1]] == [one.id, two.id]
        files = [f"{one.id}.patch", f"{two.id}.patch", "history.jsonl", "stack.json"]
        assert sorted(os.listdir(place)) == sorted(files)


def test_a_living_process_is_not_swept(scene):
    """While one writes, others that write there leave its hidden folder alone, and take a dead one's away."""
    dead = scene.folder / f"{HIDDEN}dead"
    (dead / "old").mkdir(parents=True)
    (dead / "old" / "moved").write_text("what had to make room")

    def write(new: str) -> None:
        write_text(scene.folder / "other", "meanwhile")
        run(lambda: write_text(scene.folder / "third", "from another process"))
        Path(new).write_text("whole")

    reknow.files.atomic.atomic_write(scene.folder / "one", write)
    assert {path.name: path.read_text() for path in scene.folder.iterdir()} == {
        "one": "whole",
        "other": "meanwhile",
        "third": "from another process",
        "moved": "what had to make room",
    }
