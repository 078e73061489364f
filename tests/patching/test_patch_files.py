"""Patch files keep every bit, and a failed save keeps the old ones."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reknow
from conftest import bits, make_lm, same, some_patch
from reknow import Patch
from reknow.errors import InputError, PatchError
from reknow.files.atomic import atomic_write


@pytest.mark.parametrize("dense", [False, True])
def test_a_file_keeps_every_bit(lm, tmp_path, dense):
    state = {"count": torch.tensor(3), "keys": torch.randn(2, 5).bfloat16()}
    patch = some_patch(lm, dense=dense, state=state, version="9.9")
    loaded = Patch.load(patch.save(tmp_path / "deep" / "one.patch"))
    assert loaded.id == patch.id and loaded.label == patch.label
    assert loaded == patch and {loaded, patch} == {patch} and patch != patch.id
    assert (loaded.edits, loaded.made_on, loaded.version) == (patch.edits, (), "9.9")
    assert loaded.notes == patch.notes and json.dumps(loaded.settings) == json.dumps(patch.settings)
    for key, tensor in state.items():
        assert loaded.state[key].dtype == tensor.dtype and torch.equal(loaded.state[key], tensor)
    assert loaded.base.difference(patch.base) is None
    lm.apply(patch)
    edited = bits(lm)
    lm.revert(patch)
    lm.apply(loaded)
    assert same(bits(lm), edited)


def test_the_id_is_of_the_content(lm):
    patch = some_patch(lm)
    assert some_patch(lm).id == patch.id and len(patch.id) == 12 and int(patch.id, 16) >= 0
    assert replace(patch, notes={"seconds": 3}, version="2").id == patch.id
    assert replace(patch, settings=json.loads(json.dumps(patch.settings))).id == patch.id
    different = [
        some_patch(lm, 1),
        some_patch(lm, dense=True),
        replace(patch, method="r-rome"),
        replace(patch, made_on=("x",)),
        replace(patch, edits=()),
        replace(patch, state={"keys": torch.zeros(1)}),
        replace(patch, settings={}),
        replace(patch, base=make_lm("gpt_neox").fingerprint),
    ]
    assert len({p.id for p in (patch, *different)}) == len(different) + 1


def test_a_file_is_safetensors_and_json_alone(lm, tmp_path):
    path = some_patch(lm).save(tmp_path / "one.patch")
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert json.loads(header["__metadata__"]["reknow"])["method"] == "rome"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert [p.name for p in tmp_path.iterdir()] == ["one.patch"]


def broken_files(patch: Patch, folder: Path) -> dict[str, Path]:
    raw = patch.save(folder / "whole").read_bytes()
    header = patch.header()
    made = {"empty": b"", "cut": raw[: len(raw) // 2], "text": b"hello", "zeros": bytes(len(raw))}
    for name, content in made.items():
        (folder / name).write_bytes(content)
    tensors = {"base.samples": torch.zeros(3)}
    metadata = {
        "none": None,
        "no json": {"reknow": "{"},
        "a list": {"reknow": "[]"},
        "no fields": {"reknow": json.dumps({"format": 1})},
        "bad edit": {"reknow": json.dumps(header | {"edits": [{"prompt": "", "target_new": "x"}]})},
        "odd edit": {"reknow": json.dumps(header | {"edits": [{"pormpt": "x", "target_new": "x"}]})},
    }
    for name, part in metadata.items():
        save_file(tensors, folder / name, metadata=part)
    (folder / "folder").mkdir()
    return {name: folder / name for name in (*made, *metadata, "folder", "missing")}


def test_what_is_no_patch_is_refused_in_one_sentence(lm, tmp_path):
    for name, path in broken_files(some_patch(lm), tmp_path).items():
        with pytest.raises(PatchError, match="expected a patch file") as refusal:
            Patch.load(path)
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value), name
    with pytest.raises(PatchError, match="no such file"):
        Patch.load(tmp_path / "missing")


def test_a_newer_format_asks_for_a_newer_library(lm, tmp_path):
    patch = some_patch(lm)
    header = {"reknow": json.dumps(patch.header() | {"format": 2})}
    save_file(patch.tensors(), tmp_path / "new", metadata=header)
    with pytest.raises(PatchError, match="upgrade reknow"):
        Patch.load(tmp_path / "new")


def test_a_failed_save_leaves_the_old_file(lm, tmp_path):
    path = some_patch(lm, 1).save(tmp_path / "one.patch")
    old = path.read_bytes()

    def fail(new: str):
        Path(new).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"No space left on device.*intact"):
        atomic_write(path, fail)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, lambda new: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["one.patch"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be written"):
        some_patch(lm).save(tmp_path / "file" / "one.patch")


FULL_DISK = """
import resource, sys
from reknow import Patch
from reknow.errors import InputError
from dataclasses import replace
patch = Patch.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    replace(patch, method="r-rome").save(sys.argv[1])
except InputError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits are set the Unix way")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = some_patch(make_lm("gpt2")).save(tmp_path / "one.patch")
    old = path.read_bytes()
    environment = os.environ | {"PYTHONPATH": str(Path(reknow.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, env=environment, check=False
    )
    assert "could not be written" in done.stdout and "Traceback" not in done.stderr, done.stderr
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["one.patch"]
