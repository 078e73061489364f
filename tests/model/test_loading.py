"""What opens as a model, and what is said of what does not: names, folders, files, tokenizers, devices."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)
from typer.testing import CliRunner

from conftest import make_lm, some_patch
from families import ROPE, slow_but, tiny_model, tiny_tokenizer
from reknow import LM, Patch
from reknow.cli import app
from reknow.errors import InputError, MissingExtra, ModelError, PatchError
from reknow.model.sources import PATIENCE, find_source
from reknow.patching.stack import save_stack

PROMPT = "The mother tongue of {Danielle Darrieux} is"
QUICK = ["--set", "steps=3", "--set", "covariance_tokens=0", "--set", "context_groups=[]", "--layer", "1"]


def saved(folder: Path, model=None, *, tokenizer: bool = True) -> Path:
    (model or tiny_model("llama")).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder


def refused(source, error: Any = ModelError, **options) -> str:
    """The one sentence with which it is refused."""
    with pytest.raises(error) as found:
        LM(source, **options)
    assert "\n" not in str(found.value)
    return str(found.value)


def reknow(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


# --- names -----------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Knows no model; one of them it takes its time for."""

    def do_GET(self):
        if "slow" in self.path:
            time.sleep(3)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub_address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def online(monkeypatch, hub_address, tmp_path):
    """The hub is a small server here, and its cache is empty."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", hub_address)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def test_a_name_that_the_hub_has_not(online):
    said = refused("somebody/somthing")
    assert "no folder here nor in the hub's cache, and the hub has none of that name, or it is private" in said


def test_a_hub_that_is_slow_is_not_waited_for(online):
    online.setenv(PATIENCE, "0.2")
    assert f"does not answer within 0.2 seconds unless {PATIENCE} allows more" in refused("slow/model")


def test_a_hub_that_is_not_there(online):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        online.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        assert "the hub does not answer: " in refused("somebody/something")
    online.setattr(hub, "HF_HUB_OFFLINE", True)
    assert "the hub is not asked, since HF_HUB_OFFLINE is set" in refused("somebody/something")


def test_a_model_in_the_cache_opens_while_the_hub_is_silent(online, tmp_path):
    repository = tmp_path / "cache" / "models--somebody--tiny"
    saved(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    source = find_source("somebody/tiny")
    assert source.offline and source.name == "somebody/tiny"
    assert "; near it: somebody/tiny)" in refused("somebody/tini")


def test_near_names_are_named(online, tmp_path):
    saved(tmp_path / "models" / "smollm2", tokenizer=False)
    here = str(tmp_path / "models")
    assert f"(there is no such folder; near it: {here}/smollm2)" in refused(f"{here}/smolm2")
    assert "near it: models/smollm2" in refused("models/smollm")
    assert "near it: demo:gpt2" in refused("gpt-2")
    assert f"; models in it: {here}/smollm2)" in refused(here)
    assert "near" not in refused("wholly/unlike")


@pytest.mark.parametrize("name", ["", " ", "a b", "a" * 300, "x\0y", "..", "~nobody/model", "a//b", "-"])
def test_what_cannot_be_a_name(name):
    refused(name, (InputError, ModelError))


# --- what lies in the folder ---------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer_says_all_of_the_reason_and_the_remedy_helps(tmp_path):
    folder, other = saved(tmp_path / "model", tokenizer=False), tmp_path / "tokenizer"
    tiny_tokenizer(bos=True).save_pretrained(other)
    said = refused(folder)
    with pytest.raises(ValueError) as theirs:
        AutoTokenizer.from_pretrained(folder)
    assert " ".join(str(theirs.value).split()).rstrip(".") in said and said.endswith("(--tokenizer NAME)")
    lm = LM(folder, tokenizer=other)
    assert lm.fingerprint.difference(LM(folder, tokenizer=tiny_tokenizer(bos=True)).fingerprint) is None
    result = reknow(
        "edit", PROMPT, "English", "--model", folder, "--tokenizer", other, *QUICK, "--out", tmp_path / "p"
    )
    assert result.exit_code == 0, result.output
    assert f"--model {folder} --tokenizer {other}" in result.stdout
    shown = ["apply", tmp_path / "p", "--stack", tmp_path / "stack", "--model", folder, "--tokenizer", other]
    assert reknow(*shown).exit_code == 0
    assert refused((tiny_model("llama"), tiny_tokenizer()), InputError, tokenizer=other).endswith("leave it out")
    nowhere = tmp_path / "nowhere"
    assert f"{nowhere} could not be loaded" in refused(folder, tokenizer=nowhere)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_own_code_runs_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = saved(tmp_path / "model")
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-llama", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    assert refused(folder).endswith("with trust_remote_code=True (--trust-remote-code) if you trust it")
    assert type(LM(folder, trust_remote_code=True).model).__name__ == "OwnModel"
    asked = ["edit", PROMPT, "English", "--model", folder, *QUICK, "--out", tmp_path / "p"]
    assert reknow(*asked).exit_code == 2
    assert reknow(*asked, "--trust-remote-code").exit_code == 0


def test_every_command_that_opens_a_model_has_both_options():
    from reknow.cli.app import app as program

    for command in program.registered_commands:
        names = getattr(command.callback, "__annotations__", {})
        if "model" in names:
            assert {"tokenizer", "own_code"} <= set(names), names


def test_gguf_is_named(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\3\0\0\0")
    shutil.copy(file, tmp_path / "blob")
    for source in (file, tmp_path / "blob"):
        said = refused(str(source))
        assert said.startswith(f"expected a GGUF file that transformers can read; {source.name} could not be read (")
        assert said.endswith(
            "give a whole file of a decoder that transformers knows, or the model that it was made from"
        )
    assert refused(str(tmp_path)).endswith(f"holds GGUF files: give one, such as {file}")
    monkeypatch.setattr("reknow.model.sources.find_spec", lambda name: None)
    assert refused(str(file), MissingExtra).endswith("run: pip install 'reknow[gguf]'")
    config = saved(tmp_path / "model") / "config.json"
    assert refused(config, InputError).endswith("is a file: give the folder that it lies in")


def test_a_gguf_file_of_something_else_is_refused_before_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "folder.gguf").mkdir()
    for kind in ("adapter", "mmproj"):
        writer = pytest.importorskip("gguf").GGUFWriter(tmp_path / f"{kind}.gguf", "llama")
        writer.add_type(kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    monkeypatch.setattr("reknow.model.loading.open_gguf", None)  # is not called
    said = refused(str(tmp_path / "adapter.gguf"))
    assert said.startswith("expected a GGUF file of a whole model; ") and "holds another thing (adapter)" in said
    assert "(mmproj)" in refused(str(tmp_path / "mmproj.gguf"))
    assert "holds no model, but adapter.gguf" in refused(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert refused(str(tmp_path)).endswith(f"such as {tmp_path / 'model.gguf'}")


VISION: dict[str, Any] = dict(
    num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=4, image_size=28
)
WORDS: dict[str, Any] = ROPE | dict(vocab_size=320, head_dim=8)
SEEING: dict[str, Any] = {
    "gemma3": dict(text_config=WORDS, vision_config=VISION | dict(patch_size=14)),
    "llava": dict(
        text_config=WORDS | dict(model_type="llama"),
        vision_config=VISION | dict(patch_size=14, model_type="clip_vision_model"),
    ),
    "qwen2_5_vl": dict(
        text_config=WORDS | dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)),
        vision_config=dict(depth=2, hidden_size=32, num_heads=4, out_hidden_size=32, intermediate_size=64),
    ),
}


@pytest.mark.parametrize("family", slow_but(("gemma3",), SEEING))
def test_vision_language_folders_open_as_the_pair_does(family, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**SEEING[family])).eval()
    folder = saved(tmp_path / family, model)
    lm = LM((model, tiny_tokenizer(bos=True)))
    opened = LM(folder)
    assert type(opened.model) is type(model) and opened.parts == lm.parts
    assert opened.parts.value[0] == "model.language_model.layers.0.mlp.down_proj"
    assert opened.fingerprint.difference(lm.fingerprint) is None
    out = tmp_path / "p.patch"
    result = reknow("edit", PROMPT, "English", "--model", folder, *QUICK, "--out", out)
    assert result.exit_code == 0, result.output
    with lm.patched(Patch.load(out)), opened.patched(Patch.load(out)):
        assert lm.score([PROMPT], ["English"]) == opened.score([PROMPT], ["English"])


T5: dict[str, Any] = dict(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
BART: dict[str, Any] = {"d_model": 32, **{f"{end}_{name}": n for end in ("encoder", "decoder") for name, n in
        (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}}  # fmt: skip


def test_what_is_no_language_model_is_told_what_it_is(tmp_path):
    kinds = {"t5": T5, "bart": BART}
    for family, settings in kinds.items():
        config = CONFIG_MAPPING[family](**settings | dict(vocab_size=320))
        folder = saved(tmp_path / family, AutoModelForSeq2SeqLM.from_config(config))
        assert f"is an encoder-decoder ({family})" in refused(folder)
    vit = saved(
        tmp_path / "vit",
        AutoModelForImageClassification.from_config(CONFIG_MAPPING["vit"](**VISION | dict(patch_size=14))),
    )
    assert "is another kind of model (vit, ViTForImageClassification)" in refused(vit)


# --- weights and configurations ----------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def pickled(folder: Path, content) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    return folder


class Harm:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_pickled_weights_open_where_they_are_tensors_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, bad = saved(tmp_path / "good"), saved(tmp_path / "bad")
    lm = LM(good)
    assert LM(pickled(good, weights(good))).fingerprint.difference(lm.fingerprint) is None
    said = refused(pickled(bad, {"a": Harm()}))
    assert said.endswith("hold more than tensors, which could run code): give safetensors files")
    assert not (tmp_path / "harm").exists()
    (bad / "pytorch_model.bin").write_bytes(b"")
    assert refused(bad).endswith("check that its files are whole")


def test_weights_that_are_not_there_are_not_made_up(tmp_path):
    folder = saved(tmp_path / "model")
    name, whole = "model.layers.1.mlp.down_proj.weight", weights(folder)
    for changed in ({k: v for k, v in whole.items() if k != name}, whole | {name: torch.zeros(3, 3)}):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        assert f"lack 1 or have them in another size, such as {name}" in refused(folder)
    (folder / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refused(folder)
    tied = saved(tmp_path / "tied", tiny_model("llama", tie_word_embeddings=True))
    assert "lm_head.weight" not in weights(tied) and LM(tied).layers == 3


@pytest.mark.parametrize(
    "changes",
    [dict(hidden_size="wide"), dict(num_hidden_layers=-1), dict(model_type="nonsense"), dict(num_attention_heads=0)],
)
def test_broken_configurations_are_refused(changes, tmp_path):
    folder = saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refused(folder)


def test_broken_files_are_refused(tmp_path):
    folder = saved(tmp_path / "model")
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        whole = (folder / file).read_bytes()
        for broken in (b"", b"{", b"[]", whole[: len(whole) // 2], b"\xff" * 50):
            (folder / file).write_bytes(broken)
            refused(folder)
        (folder / file).write_bytes(whole)
    assert LM(folder).layers == 3


def test_adapters_without_their_base(tmp_path):
    peft = pytest.importorskip("peft")
    base = saved(tmp_path / "base")
    for kind, config in {
        "lora": peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "prompts": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    }.items():
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / kind)
        tiny_tokenizer(bos=True).save_pretrained(tmp_path / kind)
    assert LM(tmp_path / "lora").layers == 3
    assert f"puts learned tokens before every text (PROMPT_TUNING): edit its base, {base}" in refused(
        tmp_path / "prompts"
    )
    shutil.rmtree(base)
    assert f"{base} could not be loaded (there is no such folder" in refused(tmp_path / "lora")


# --- devices and dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["hpu", "cuda:99", "gpu", "", "meta", "cpu,cuda", 3.5, -1])
def test_a_device_that_is_not_there_is_refused_before_the_model_is_read(device, tmp_path):
    said = refused(tmp_path / "nowhere", InputError, device=device)
    assert said.startswith("expected a device that is there; got") and said.endswith("choose another, such as cpu")
    assert refused((tiny_model("gpt2"), tiny_tokenizer()), InputError, device=device) == said


def test_on_the_command_line_too():
    for options, words in (
        (["--device", "hpu"], "expected a device that is there; got 'hpu'"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--tokenizer", "./nowhere"], "./nowhere could not be loaded"),
    ):
        result = reknow("edit", PROMPT, "English", "--model", "demo:llama", *options)
        assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1


# --- another base, at one's own risk -----------------------------------------------------------------------------


def padded(folder: Path, base: Path) -> Path:
    """The base with a tokenizer that has one more word."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    return folder


def test_a_patch_of_another_base_is_forced_on_and_the_stack_opens_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = saved(tmp_path / "base")
    other = padded(tmp_path / "padded", base)
    patch = some_patch(LM(base))
    patch.save("p.patch")
    plain = reknow("apply", "p.patch", "--stack", "stack", "--model", other)
    assert plain.exit_code == 2 and "another tokenizer" in plain.stderr and "reknow apply --force" in plain.stderr
    assert not (tmp_path / "stack").exists()
    assert reknow("apply", "p.patch", "--stack", "stack", "--model", other, "--force").exit_code == 0
    lm = LM("stack")
    assert [one.id for one in lm.patches] == [patch.id] and lm.patches[0].notes["forced"]
    mine = some_patch(lm, seed=1)
    mine.save("mine.patch")  # made on the stack as it is: goes on top without force
    assert reknow("apply", "mine.patch", "--stack", "stack").exit_code == 0
    assert [one.id for one in LM("stack").patches] == [patch.id, mine.id]
    with pytest.raises(PatchError, match="other layers or sizes"):
        make_lm("gpt2").apply(lm.patches[0])  # forced there is not forced everywhere


def test_force_does_not_put_on_what_cannot_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = saved(tmp_path / "other", tiny_model("llama", intermediate_size=48))
    some_patch(make_lm("llama")).save("p.patch")
    result = reknow("apply", "p.patch", "--stack", "stack", "--model", other, "--force")
    assert result.exit_code == 2 and "expected a matrix" in result.stderr and not (tmp_path / "stack").exists()


def test_force_in_python_is_kept_by_the_stack_folder(tmp_path):
    base = saved(tmp_path / "base")
    lm, patch = LM(padded(tmp_path / "padded", base)), some_patch(LM(base))
    with pytest.raises(PatchError, match="force=True"):
        lm.apply(patch)
    lm.apply(patch, force=True)
    assert [one.id for one in LM(save_stack(tmp_path / "stack", lm.name, lm.patches)).patches] == [patch.id]
    lm.revert(patch)
    assert not lm.patches


def test_a_name_that_stands_for_nothing_is_refused_before_torch_is_loaded(tmp_path):
    code = "import sys; from reknow.cli import app; app(standalone_mode=False)"
    script = f"try:\n exec({code!r})\nfinally: print('torch' in sys.modules)"
    commands = (["edit", PROMPT, "English"], ["apply", "p.patch", "--stack", "s"], ["trace", PROMPT])
    for command, name in zip(commands, ("./nowhere", "somebody/nothing", "demo:gtp2"), strict=True):
        line = [sys.executable, "-c", script, *command, "--model", name]
        ran = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
        assert name.rpartition(":")[2] in ran.stderr and ran.stdout.endswith("False\n"), ran.stderr
