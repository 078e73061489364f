"""Models that carry adapters of peft are edited as the same models with the adapters merged into their weights."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import bits, close, make_lm, same, some_patch
from families import slow_but, tiny_model, tiny_tokenizer, wide_llama, with_matrices
from reknow import LM, Edit, method
from reknow.errors import InputError, ModelError, PatchError
from reknow.model.loading import carries_adapters
from reknow.model.tokens import Text
from reknow.patching.deltas import add_deltas

peft = pytest.importorskip("peft")

EDIT = Edit("I know {}", subject="Danielle Darrieux", target_new="of")
QUICK = dict(layer=2, layers=(2,), steps=25, context_groups=((2, 3),), covariance_tokens=200)
TASK = dict(task_type="CAUSAL_LM")
LORA = dict(r=4, init_lora_weights=False, **TASK)

ADAPTERS = {
    "all matrices": lambda: peft.LoraConfig(target_modules="all-linear", **LORA),
    "attention alone": lambda: peft.LoraConfig(target_modules=["q_proj", "o_proj"], **LORA),
    "the value matrix alone": lambda: peft.LoraConfig(target_modules=["down_proj"], **LORA),
    "DoRA": lambda: peft.LoraConfig(target_modules="all-linear", use_dora=True, **LORA),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False, **TASK
    ),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=["up_proj", "down_proj"], init_weights=False, **TASK),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["down_proj"], init_weights=False, **TASK),
    "a matrix trained whole": lambda: peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["down_proj"], **LORA
    ),
    "the embedding and the head": lambda: peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], **LORA
    ),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], **TASK),
}
INSIDE_THE_MLP = {"all matrices", "the value matrix alone", "DoRA", "IA3", "LoHa", "OFT", "a matrix trained whole"}


def adapted(kind: str):
    """A tiny model with the adapters, and its twin with them merged in."""
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_model("llama"), ADAPTERS[kind]())
    with torch.no_grad():  # what is trained whole begins as a copy: move it
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), copy.deepcopy(model).merge_and_unload().eval()


def pair(model) -> LM:
    return LM((model, tiny_tokenizer(bos=True)))


def logits(lm: LM) -> torch.Tensor:
    batch = lm.pad(lm.encode([Text("I know Danielle Darrieux of"), Text("The capital of Peru is Lima")]))
    found = lm.forward(batch.ids, batch.mask, batch.positions, None).logits.detach()
    return found[batch.mask.bool()]


@pytest.fixture(scope="module", params=ADAPTERS)
def twins(request) -> tuple[str, LM, LM]:
    model, merged = adapted(request.param)
    return request.param, pair(model), pair(merged)


def test_the_parts_are_those_of_the_model_without(twins):
    kind, lm, merged = twins
    assert lm.parts == merged.parts == make_lm("llama").parts
    assert carries_adapters(lm.model) and not carries_adapters(merged.model)
    assert close(logits(lm), logits(merged))
    for name in (lm.parts.value[1], *lm.parts.mlp_in[1], lm.parts.attention_out[1]):
        assert close(lm.weight(name), merged.weight(name)), kind


def test_a_patch_does_what_it_does_to_the_merged_model_and_comes_off_bit_for_bit(twins):
    kind, lm, merged = twins
    before, read = bits(lm), logits(lm)
    patch = some_patch(lm, layers=(0, 2))
    lm.apply(patch)
    merged.apply(patch, force=True)
    assert lm.unmerged == (tuple(patch.deltas) if kind in INSIDE_THE_MLP else ())
    assert close(logits(lm), logits(merged)) and not close(logits(lm), read)
    for name, delta in patch.deltas.items():
        assert close(lm.weight(name), add_deltas(merged.base_weight(name).double(), [delta]).float())
    lm.revert(patch)
    merged.revert(patch)
    assert same(bits(lm), before) and torch.equal(logits(lm), read)


@pytest.mark.parametrize("name", ["rome", "memit", "ft-m", "grace", "kn"])
@pytest.mark.parametrize("kind", slow_but(("all matrices",), ("all matrices", "IA3", "DoRA")))
def test_methods_make_the_edit_that_they_make_on_the_merged_model(name, kind):
    lm, merged = (pair(model) for model in adapted(kind))
    settings = QUICK | (dict(learning_rate=2e-2, clamp=None) if name == "ft-m" else {})
    made = method(name, **{key: value for key, value in settings.items() if key in vars(method(name))})
    here, there = (made.edit(one, [EDIT]) for one in (lm, merged))
    assert here.deltas.keys() == there.deltas.keys()
    with lm.patched(here), merged.patched(there):
        assert close(logits(lm), logits(merged), 1e-2)
        assert lm.generate("I know Danielle Darrieux", 1) == merged.generate("I know Danielle Darrieux", 1)
        if name != "kn":
            assert lm.generate(["I know Danielle Darrieux"], 1) == [" of"]


def test_a_patch_belongs_to_the_model_with_its_adapters():
    lm, merged = (pair(model) for model in adapted("all matrices"))
    with pytest.raises(PatchError, match="other layers or sizes"):
        merged.apply(some_patch(lm))
    with pytest.raises(PatchError, match="other layers or sizes"):
        make_lm("llama").apply(some_patch(lm))


def test_matrices_stored_the_other_way_round():
    config = peft.LoraConfig(target_modules=["c_fc", "c_proj"], fan_in_fan_out=True, **LORA)
    model = peft.get_peft_model(tiny_model("gpt2"), config)
    lm, merged = LM((model, tiny_tokenizer())), LM((copy.deepcopy(model).merge_and_unload(), tiny_tokenizer()))
    assert lm.parts == merged.parts
    patch = some_patch(lm)
    lm.apply(patch)
    merged.apply(patch, force=True)
    assert close(logits(lm), logits(merged))


def test_adapters_on_four_bits():
    modules = pytest.importorskip("bitsandbytes").nn
    model = peft.get_peft_model(
        with_matrices(wide_llama(), modules.Linear4bit, compute_dtype=torch.float32), ADAPTERS["all matrices"]()
    )
    lm = pair(model)
    assert lm.parts.value[0] == "model.layers.0.mlp.down_proj"
    patch = some_patch(lm, size=0.5)
    read = logits(lm)
    with lm.patched(patch):
        (name,) = lm.unmerged
        states = torch.randn(4, 128)
        change = lm.model.get_submodule(name)(states)
    assert close(change - lm.model.get_submodule(name)(states), states @ patch.deltas[name].dense().float().T, 1e-3)
    assert torch.equal(logits(lm), read)


@pytest.mark.parametrize("name", ["lora", "adalora"])
@pytest.mark.parametrize("kind", ["all matrices", "attention alone"])
def test_methods_that_put_adapters_into_the_model_refuse_one_that_has_some(name, kind):
    lm, merged = (pair(model) for model in adapted(kind))
    before = bits(lm)
    with pytest.raises(ModelError, match=r"merge them, model\.merge_and_unload\(\)"):
        method(name, layers=(2,), steps=2).edit(lm, [EDIT])
    assert same(bits(lm), before)
    assert method(name, layers=(2,), steps=5).edit(merged, [EDIT]).deltas  # the remedy is there


PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **TASK),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **TASK),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, **TASK),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_learned_tokens_before_every_text_are_refused(kind):
    model = peft.get_peft_model(tiny_model("llama"), PROMPTS[kind]())
    with pytest.raises(ModelError, match=r"learned tokens before every text .* model\.get_base_model\(\)"):
        pair(model)
    assert pair(model.get_base_model()).layers == 3


def test_a_folder_with_adapters_opens_on_its_base(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = peft.get_peft_model(base, ADAPTERS["all matrices"]()).eval()
    model.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer(bos=True).save_pretrained(tmp_path / "tuned")
    lm, merged = LM(tmp_path / "tuned"), pair(model.merge_and_unload())
    assert lm.parts == merged.parts and carries_adapters(lm.model)
    assert close(logits(lm), logits(merged))


def test_what_is_no_model_of_transformers_is_refused():
    for wrong in (torch.nn.Linear(2, 2), torch.nn.DataParallel(tiny_model("gpt2")), None):
        with pytest.raises(InputError, match=r"a pair \(model, tokenizer\) of transformers"):
            LM((wrong, tiny_tokenizer()))
