"""The cache folder: what statistics take, which files make room for others, and how they are shown and removed."""

from __future__ import annotations

import json
import logging
import os
import time

import pytest
import torch
from typer.testing import CliRunner

from conftest import make_lm
from reknow.cli.app import app
from reknow.editing.covariance import covariance, statistics
from reknow.editing.triangle import ROWS, Triangle, block_shapes, kept_bytes
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.evaluation.cost import estimate
from reknow.files.cache import MODELS, cache_folder, cache_limit, clear_cache, evict, statistics_files
from reknow.methods.alphaedit import AlphaEdit
from reknow.methods.memit import MEMIT
from reknow.methods.rome import ROME

TEXTS = ["The capital of Peru is Lima .", "Paris is in France .", "Beats Music is owned by Apple . " * 9]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path / "cache"))


def aged(file, seconds: float) -> None:
    """As if it had been used so long ago."""
    then = time.time() - seconds
    os.utime(file, (then, then))


@pytest.mark.parametrize("width", [1, 5, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 3 * ROWS + 7])
def test_a_triangle_is_the_matrix(width):
    keys = torch.randn(40, width, dtype=torch.float64)
    triangle = Triangle.zeros(width, torch.device("cpu"))
    triangle.add_products(keys[:15])
    triangle.add_products(keys[15:])
    full = triangle.full()
    assert torch.allclose(full, keys.T @ keys) and torch.equal(full, full.T)
    assert [tuple(block.shape) for block in triangle.blocks] == block_shapes(width)
    assert sum(block.nbytes for block in triangle.to(torch.float32).blocks) == kept_bytes(width)


def test_a_covariance_takes_a_quarter_of_the_matrix_in_float64():
    assert kept_bytes(18_944) == pytest.approx(0.25 * 8 * 18_944**2, rel=0.02)
    lm = make_lm("gpt2")
    one = statistics(lm, [1], text=TEXTS)[1]
    width = len(one.covariance)
    assert kept_bytes(width) < one.file.stat().st_size < kept_bytes(width) + 2000


def test_files_tell_what_they_are():
    lm = make_lm("llama")
    found = statistics(lm, [0, 2], text=TEXTS)
    listed = statistics_files()
    assert {each.file for each in listed} == {one.file for one in found.values()}
    assert {each.matrix for each in listed} == {lm.parts.value[0], lm.parts.value[2]}
    assert {each.model for each in listed} == {lm.name} and all(each.tokens == found[0].tokens for each in listed)


def test_what_was_used_longest_ago_makes_room(monkeypatch, caplog):
    lm = make_lm("llama")
    files = [statistics(lm, [layer], text=TEXTS)[layer].file for layer in (0, 1, 2)]
    for number, file in enumerate(files):
        aged(file, 100 - number)
    size = files[0].stat().st_size
    covariance(lm, 0, text=TEXTS)  # reading is use
    assert [each.file for each in statistics_files()] == [files[1], files[2], files[0]]
    monkeypatch.setenv("REKNOW_CACHE_GB", str(3.5 * size / 1e9))
    with caplog.at_level(logging.INFO):
        statistics(lm, [1], text=TEXTS[:1])
    assert not files[1].exists() and files[2].exists() and files[0].exists()
    assert "removed 1 files" in caplog.text and "REKNOW_CACHE_GB" in caplog.text


def test_what_is_in_use_stays_whatever_the_bound(monkeypatch):
    lm = make_lm("llama")
    old = statistics(lm, [1], text=TEXTS)[1].file
    monkeypatch.setenv("REKNOW_CACHE_GB", "0")
    running, left = (cache_folder() / f"sums-{name}.safetensors" for name in ("running", "left"))
    running.write_bytes(b"another process reads")
    left.write_bytes(b"a process was killed")
    aged(left, 100_000)
    found = statistics(lm, [0, 2], text=TEXTS)
    assert {*cache_folder().iterdir()} == {running, *(one.file for one in found.values())}
    assert not old.exists()
    assert [each.file for each in evict(using=[running])] == [one.file for one in found.values()]


def test_other_files_are_left_alone(monkeypatch):
    statistics(make_lm("llama"), [1], text=TEXTS)
    chosen = cache_folder() / "layers.json"
    chosen.write_text("{}")
    monkeypatch.setenv("REKNOW_CACHE_GB", "0")
    assert len(clear_cache()) == 1 and clear_cache() == [] == evict()
    assert [*cache_folder().iterdir()] == [chosen]


@pytest.mark.parametrize("wrong", ["a lot", "-1", "nan"])
def test_a_bound_that_is_no_size_is_refused_before_the_work(monkeypatch, wrong):
    lm = make_lm("llama")
    monkeypatch.setenv("REKNOW_CACHE_GB", wrong)
    monkeypatch.setattr(lm, "forward", lambda *_: pytest.fail("nothing is read"))
    with pytest.raises(InputError, match="REKNOW_CACHE_GB as a number of gigabytes"):
        covariance(lm, 1, text=TEXTS)
    monkeypatch.setenv("REKNOW_CACHE_GB", "0.5")
    assert cache_limit() == 5e8


def test_the_command_shows_and_clears_them():
    lm = make_lm("llama")
    assert json.loads(ran("cache", "--json")) == []
    one = statistics(lm, [1], text=TEXTS)[1]
    (row,) = json.loads(ran("cache", "--json"))
    assert row["matrix"] == lm.parts.value[1] and row["bytes"] == one.file.stat().st_size
    assert "kept: 1 files" in ran("cache") and one.file.exists()
    assert "removed: 1 files" in ran("cache", "--clear") and not one.file.exists()
    assert torch.equal(covariance(lm, 1, text=TEXTS), one.covariance), "read again"


def test_converted_models_are_shown_and_cleared_and_not_bounded(monkeypatch):
    monkeypatch.setenv("REKNOW_CACHE_GB", "0")
    folder = cache_folder() / MODELS / "tiny-0123"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder.parent / ".reknow-half").mkdir()
    assert not evict()
    (row,) = json.loads(ran("cache", "--json"))
    assert (row["model"], row["bytes"], row["file"]) == ("tiny", 1000, str(folder))
    assert "kept: 0 files, 0 GB" in (said := ran("cache")) and said.endswith("; 1 models, 1e-06 GB\n")
    assert "1 models" in ran("cache", "--clear") and os.listdir(folder.parent) == [".reknow-half"]


def ran(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_plan_names_sizes():
    lm, edit = make_lm("gpt2"), Edit("{} is", subject="Peru", target_new="Lima")
    width = lm.base_weight(lm.parts.value[0]).shape[1]
    one, two = (estimate(lm, MEMIT(layers=layers), [edit]) for layers in ((1,), (0, 1)))
    assert one.statistics == kept_bytes(width) and two.statistics == 2 * one.statistics
    assert one.solver == two.solver == 12 * width**2 < one.memory
    assert estimate(lm, AlphaEdit(layers=(1,)), [edit]).solver == 28 * width**2
    none = estimate(lm, ROME(layer=1, covariance_tokens=0), [edit])
    assert none.statistics == none.solver == 0
    written = estimate(lm, ROME(layer=1, covariance_tokens=0, context_source="model"), [edit])
    assert [step.what for step in none.steps] == ["gradient descent"]
    assert [step.what for step in written.steps] == ["sampling contexts", "gradient descent"]
