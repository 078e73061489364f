"""A full disk: one sentence, and nothing is lost of what was there."""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import make_lm, some_patch
from families import TEXT
from gguf_models import write_gguf
from reknow import LM
from reknow.cli import tracing
from reknow.editing.covariance import statistics
from reknow.editing.layer_choice import LayerScore, keep_scores, suggest_layer
from reknow.engine.jobs import Local
from reknow.errors import InputError
from reknow.export.adapter import export_lora
from reknow.export.checkpoint import export_checkpoint
from reknow.export.gguf_adapter import export_gguf_lora
from reknow.export.gguf_model import export_gguf
from reknow.files.atomic import append_line
from reknow.files.json_lines import Rows
from reknow.methods import method
from reknow.patching.stack import read_stack, save_stack
from reknow.tracing.causal import Tracing

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="limits are set the Unix way")


def said_on_a_full_disk(action: Callable[[], object], room: int) -> str:
    """What the action says in a process whose files may have `room` bytes each; "" where it succeeds."""
    import resource

    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            action()
            text = ""
        except InputError as error:
            text = str(error)
        except BaseException as error:
            text = f"{type(error).__name__}\n{error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.fixture
def lm(tmp_path) -> LM:
    made = make_lm("llama", num_hidden_layers=2)
    made.model.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    return LM(tmp_path / "base")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, action: Callable[[], object], room: int) -> None:
    """The action is refused for want of room in one sentence, and the folder stays as it was."""
    before = files(folder)
    said = said_on_a_full_disk(action, room)
    assert "could not be written (" in said and "\n" not in said and "intact: free space" in said, said
    assert files(folder) == before


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_gguf_file(lm, tmp_path, share):
    lm.apply(some_patch(lm))
    base, out = write_gguf(lm, tmp_path / "base.gguf"), tmp_path / "out.gguf"
    out.write_text("an old one")
    room = int(base.stat().st_size * share)
    refused(tmp_path, lambda: export_gguf(lm, base, out, overwrite=True), room)
    refused(tmp_path, lambda: export_gguf_lora(lm, tmp_path / "adapter"), 100)
    assert out.read_text() == "an old one"


@pytest.mark.parametrize("room", [100, 5_000, 20_000])  # the configuration, the tokenizer, the weights do not fit
def test_exports(lm, tmp_path, room):
    lm.apply(some_patch(lm))
    for export in (export_checkpoint, export_lora):
        if room > 100 and export is export_lora:
            continue  # which is as small as that
        out = tmp_path / export.__name__
        refused(tmp_path, lambda export=export, out=out: export(lm, out), room)
        export(lm, out)
        refused(tmp_path, lambda export=export, out=out: export(lm, out, overwrite=True), room)


def test_patches_and_stacks(lm, tmp_path):
    one, two = some_patch(lm, 1), some_patch(lm, 2)
    tuned, other = (method("lora", layers=(1,), steps=n).edit(lm, one.edits) for n in (1, 2))
    one.save(tmp_path / "a.patch")
    tuned.save(tmp_path / "tuned")
    save_stack(tmp_path / "stack", "base", [one])
    for room in (10, 1_000):
        refused(tmp_path, lambda: two.save(tmp_path / "a.patch"), room)
        refused(tmp_path, lambda: other.save(tmp_path / "tuned"), room)
        refused(tmp_path, lambda: save_stack(tmp_path / "stack", "base", [one, two]), room)
    assert [patch.id for patch in read_stack(tmp_path / "stack")[1]] == [one.id]


def test_lines(tmp_path):
    """A line that does not fit leaves nothing of itself, so that the next one is whole."""
    rows = Rows(tmp_path / "rows.jsonl", ("case",))
    rows.add({"case": "one"})
    refused(tmp_path, lambda: rows.add({"case": "two", "text": "x" * 100}), 60)
    rows.add({"case": "three"})
    assert [json.loads(line)["case"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [
        "one",
        "three",
    ]
    append_line(tmp_path / "new" / "file", "Zoë")
    assert (tmp_path / "new" / "file").read_text(encoding="utf-8") == "Zoë\n"


@pytest.mark.slow
def test_traces(lm, tmp_path, monkeypatch):
    monkeypatch.setattr("reknow.tracing.many.known_facts", lambda lm, facts: facts[:3])
    settings = Tracing(samples=2, kinds=("hidden",))

    def trace() -> None:
        tracing.trace_many(Local(lm), "known_1000", 3, settings, tmp_path / "trace", False, True)

    monkeypatch.setattr(builtins, "print", lambda *_, **__: None)
    for room in (50, 1_500):  # the first line; a trace
        said = said_on_a_full_disk(trace, room)
        assert "could not be written (" in said and "\n" not in said, said
    lines = (tmp_path / "trace" / "traces.jsonl").read_bytes()
    assert lines.endswith(b"\n") and all(json.loads(line) for line in lines.splitlines())
    trace()
    said = said_on_a_full_disk(trace, 5_000)  # a picture
    assert "average.png could not be written (" in said and "\n" not in said, said
    assert len((tmp_path / "trace" / "traces.jsonl").read_bytes().splitlines()) == 4


# --- the cache -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file/cache", "/proc/cache", "full"])
def test_a_cache_that_cannot_be_written_to_loses_nothing_of_the_work(tmp_path, monkeypatch, place):
    """What was computed is used, and the warning names the way out."""
    (tmp_path / "file").write_text("no folder")
    text, lm = [TEXT] * 3, make_lm("gpt2")
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path / "kept"))
    (kept,) = statistics(lm, [1], tokens=200, text=text).values()
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path / place))

    def again() -> None:
        with pytest.warns(UserWarning, match=r"could not be written .*: what was computed is used.*REKNOW_CACHE"):
            (found,) = statistics(lm, [1], tokens=200, text=text).values()
        assert torch.equal(found.covariance, kept.covariance) and found.tokens == kept.tokens
        with pytest.warns(UserWarning, match=r"layers\.json could not be written .*REKNOW_CACHE"):
            keep_scores(lm, [LayerScore(2, 0.0, 1.0, 1.0, 1.0)])
        assert suggest_layer(lm) == 2

    assert said_on_a_full_disk(again, 20 if place == "full" else 10**9) == ""
