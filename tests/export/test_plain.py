"""Exported checkpoints, read by plain transformers: adapters within, the base's dtype, its processor's files."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)

from conftest import bits, same, some_patch
from families import ROPE, slow_but, tiny_model, tiny_tokenizer
from reknow import LM, Edit
from reknow.errors import PatchError
from reknow.export.adapter import export_lora
from reknow.export.checkpoint import export_checkpoint
from reknow.export.plain import narrow_weights, rounded_weights
from reknow.export.written import describe_rounding
from reknow.patching.deltas import add_deltas

IDS = torch.tensor([[10, 40, 80, 120, 200]])


def saved(family, folder, dtype=torch.float32, **changes):
    tiny_model(family, **changes).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def lora(*targets, **settings):
    targets = list(targets) or ["q_proj"]
    return LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **settings)


def two_adapters(model):
    tuned = get_peft_model(model, lora("q_proj"))
    tuned.add_adapter("other", lora("v_proj"))
    tuned.add_adapter("asleep", lora("k_proj"))
    tuned.base_model.set_adapter(["default", "other"])
    return tuned


def disabled(model):
    tuned = get_peft_model(model, lora("q_proj", "v_proj"))
    tuned.base_model.disable_adapter_layers()
    return tuned


ADAPTED = {
    "lora": lambda model: get_peft_model(model, lora("q_proj", "o_proj")),
    "dora": lambda model: get_peft_model(model, lora("q_proj", use_dora=True)),
    "a head of its own": lambda model: get_peft_model(model, lora(modules_to_save=["lm_head"])),
    "an embedding, the head tied to the base's": lambda model: get_peft_model(model, lora("embed_tokens", "q_proj")),
    "some tokens": lambda model: get_peft_model(model, lora(trainable_token_indices=[10, 40])),
    "ia3": lambda model: get_peft_model(
        model, IA3Config(target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False)
    ),
    "on the edited matrix": lambda model: get_peft_model(model, lora("down_proj", "up_proj")),
    "a copy of the edited matrix": lambda model: get_peft_model(model, lora(modules_to_save=["down_proj"])),
    "two active of three": two_adapters,
    "none active": disabled,
}


@pytest.mark.parametrize("wrapped", slow_but((True,), (True, False)), ids=["peft's model", "the model within"])
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_are_added_to_the_weights(name, wrapped, tmp_path):
    torch.manual_seed(0)
    model = tiny_model("llama", tie_word_embeddings=True)
    tuned = ADAPTED[name](model)
    for parameter in tuned.parameters():  # tokens and heads start as the base's
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    lm = LM((tuned if wrapped else model, tiny_tokenizer()))
    lm.apply(some_patch(lm, size=0.5))
    before, wanted = bits(lm), lm.model(IDS).logits
    report = export_checkpoint(lm, tmp_path / "out")
    assert same(bits(lm), before) and torch.equal(lm.model(IDS).logits, wanted)
    found = AutoModelForCausalLM.from_pretrained(report.folder)
    assert not any("lora" in key or "base_layer" in key for key in found.state_dict())
    assert torch.allclose(found(IDS).logits, wanted, atol=1e-4)
    lm.revert(lm.patches[0].id)
    assert not torch.allclose(found(IDS).logits, lm.model(IDS).logits, atol=1e-2)


def test_the_folder_of_an_adapter_is_exported_with_its_base_and_the_edit(tmp_path):
    base = saved("llama", tmp_path / "base", torch.float16)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(modules_to_save=["lm_head"]))
    tuned.save_pretrained(tmp_path / "sft")
    tiny_tokenizer().save_pretrained(tmp_path / "sft")
    for dtype, written in ((None, torch.float16), ("float32", torch.float32)):
        lm = LM(tmp_path / "sft", dtype=dtype)
        lm.apply(some_patch(lm, size=0.5))
        report = export_checkpoint(lm, tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out" / "adapter_config.json").exists() and report.dtype == written
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert torch.allclose(found(IDS).logits, lm.model(IDS).logits, atol=1e-4 if dtype else 5e-2)
    assert LM(tmp_path / "out").generate("The capital of Peru is", 8) == lm.generate("The capital of Peru is", 8)
    with pytest.raises(PatchError, match=r"without adapters.*--to hf"):
        export_lora(lm, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_adapters_of_a_quantised_base_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear8bitLt

    model = tiny_model("llama")
    for block in model.model.layers:
        matrix = Linear8bitLt(32, 32, bias=False, has_fp16_weights=False)
        matrix.load_state_dict(block.self_attn.q_proj.state_dict())
        block.self_attn.q_proj = matrix
    model.is_loaded_in_8bit = True
    get_peft_model(model, lora("q_proj"))
    lm = LM((model.to("cpu"), tiny_tokenizer()))
    lm.apply(some_patch(lm))
    with pytest.raises(PatchError, match="quantised"):
        export_checkpoint(lm, tmp_path / "out")


# --- dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_half_base_is_written_in_half_again(family, tmp_path):
    base = saved(family, tmp_path / "base", torch.float16)
    lm = LM(base)
    assert lm.dtype == torch.float32
    patch = some_patch(lm, size=0.5)
    lm.apply(patch)
    report = export_checkpoint(lm, tmp_path / "out")
    assert report.dtype == torch.float16 and report.edits == 1 and report.held is not None
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    old, new = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (base, report.folder))
    name = lm.parts.value[1]
    for key, tensor in old.state_dict().items():
        found = new.state_dict()[key]
        assert found.dtype == torch.float16
        if key == f"{name}.weight":
            matrix = patch.deltas[name].dense()
            tensor = (tensor.double() + (matrix.T if family == "gpt2" else matrix)).half()  # cast once
        assert torch.equal(found, tensor), key
    assert lm.dtype == torch.float32 and lm.model.config.dtype == torch.float16  # a second export knows it too
    assert export_checkpoint(lm, tmp_path / "out", overwrite=True).dtype == torch.float16


def test_a_dtype_that_was_asked_for_is_kept(tmp_path):
    base = saved("llama", tmp_path / "base", torch.float16)
    pair = (AutoModelForCausalLM.from_pretrained(base, dtype="auto"), AutoTokenizer.from_pretrained(base))
    for lm in (LM(base, dtype="float32"), LM(pair, dtype=torch.float32)):
        lm.apply(some_patch(lm))
        report = export_checkpoint(lm, tmp_path / "out", overwrite=True)
        assert report.dtype == torch.float32 and report.held is None
        assert torch.equal(AutoModelForCausalLM.from_pretrained(report.folder)(IDS).logits, lm.model(IDS).logits)


def test_weights_that_were_wider_in_the_checkpoint_stay_wide(tmp_path):
    """Models keep some weights in float32 beside half ones; so does what was trained on since."""
    base = saved("llama", tmp_path / "base", torch.float16)
    lm = LM(base)
    norm = lm.model.get_submodule(lm.parts.final_norm[0]).weight
    norm.data += 1e-5
    lm.apply(some_patch(lm))
    export_checkpoint(lm, tmp_path / "out")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "out" / "model.safetensors")
    wide = [name for name, tensor in found.items() if tensor.dtype == torch.float32]
    assert wide == [f"{lm.parts.final_norm[0]}.weight"] and torch.equal(found[wide[0]], norm)


def test_edits_are_read_in_the_weights_as_they_are_written(tmp_path):
    lm = LM(saved("llama", tmp_path / "base", torch.float16))
    patch = some_patch(lm, size=0.5)
    prompts = [f"The capital of {place} is" for place in range(200)]
    with lm.patched(patch):
        unrounded = lm.model(IDS).logits
        tops = [lm.tokenizer.decode(score.top[0]) for score in lm.score(prompts, ["x"] * 200)]
        place, said = next((i, top.strip()) for i, top in enumerate(tops) if top.strip().isalpha() and top[0] == " ")
    edits = (Edit(prompts[place], target_new=said), Edit(prompts[place], target_new="Lima"))
    lm.apply(replace(patch, edits=edits))
    before = bits(lm)
    with rounded_weights(narrow_weights(lm, lm.model)[0]):
        inside = lm.model(IDS).logits
    report = export_checkpoint(lm, tmp_path / "out")
    assert same(bits(lm), before) and (report.edits, report.held) == (2, (1, 1))
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(IDS).logits
    assert torch.equal(inside, written) and not torch.equal(inside, unrounded)
    told, lost = describe_rounding(report)
    assert "1 of 2 edits in memory, 1 as written" in told and not lost
    (warning,) = describe_rounding(replace(report, held=(2, 1)))[1]
    assert "rounding to float16 loses 1 of the edits: --dtype float32" in warning


@pytest.mark.parametrize(("size", "warned"), [(0.5, False), (5000.0, True)])
def test_a_change_so_large_that_the_base_beneath_it_is_rounded_away_is_told(tmp_path, size, warned):
    lm = LM(saved("llama", tmp_path / "base", torch.float16))
    lm.apply(patch := some_patch(lm, size=size))
    report = export_checkpoint(lm, tmp_path / "out")
    shares = []
    for name in patch.deltas:
        with lm.unpatched():
            base = lm.base_weight(name).double()
        summed = add_deltas(base, [patch.deltas[name]])
        shares.append(float((summed.half().double() - summed).norm() / base.norm()))
    assert report.lost == pytest.approx(max(shares), rel=1e-6)
    _, lost = describe_rounding(report)
    assert ("takes" in "".join(lost)) == warned == (max(shares) > 0.02)


def test_a_sum_that_the_checkpoint_cannot_hold_is_refused(tmp_path):
    lm = LM(saved("llama", tmp_path / "base", torch.float16))
    lm.apply(some_patch(lm, size=1e5))
    with pytest.raises(PatchError, match=r"overflows.*--dtype float32"):
        export_checkpoint(lm, tmp_path / "out")


# --- settings of generation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.3}, {"top_p": 0.5, "top_k": 7}, {"do_sample": True, "max_length": 9}]
)
def test_settings_of_generation_are_written_as_they_are(tmp_path, changes):
    """Many models have a temperature without sampling, which transformers reads and does not write."""
    base = saved("llama", tmp_path / "base")
    written = json.loads((tmp_path / "base" / "generation_config.json").read_text()) | changes
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(written))
    lm = LM(base)
    lm.apply(some_patch(lm))
    export_checkpoint(lm, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert {name: getattr(found, name) for name in changes} == changes
    assert {name: getattr(lm.model.generation_config, name) for name in changes} == changes


# --- files -----------------------------------------------------------------------------------------------


def test_the_files_of_a_processor_come_along(tmp_path):
    base = tmp_path / "base"
    config = Gemma3Config(
        text_config=dict(**ROPE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8, vocab_size=320),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        ),
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    marks = {name: "<s>" for name in ("boi_token", "eoi_token", "image_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, **marks, eos_token="</s>"
    )
    processor = Gemma3Processor(Gemma3ImageProcessor(size={"height": 28, "width": 28}), tokenizer)
    processor.save_pretrained(base)
    (base / "tokenizer.model").write_bytes(b"as llama.cpp reads it")
    (base / "README.md").write_text("about the base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lm = LM(base)
        lm.apply(some_patch(lm))
        export_checkpoint(lm, tmp_path / "out")
    for name in ("processor_config.json", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert "about the base" not in (tmp_path / "out" / "README.md").read_text()  # it has a card of its own
    assert type(AutoProcessor.from_pretrained(tmp_path / "out")) is Gemma3Processor
