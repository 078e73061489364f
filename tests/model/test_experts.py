"""Mixtures of experts: what stands in for the value matrices of a layer's experts, and what is written to them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import bits, close, make_lm, same, some_patch
from families import tiny_model, tiny_tokenizer
from reknow import LM, Edit, Patch, method
from reknow.errors import ModelError, PatchError
from reknow.evaluation.differences import inspect_weights, subject_keys
from reknow.export.adapter import export_lora
from reknow.export.checkpoint import export_checkpoint
from reknow.export.gguf_names import llama_cpp_name
from reknow.model.experts import ExpertsValue
from reknow.model.tokens import Text

MIXTURES = ("olmoe", "mixtral", "qwen2_moe", "gpt_oss")
IDS = torch.tensor([[10, 40, 80, 120, 200]])
EDIT = Edit("I know {}", subject="Danielle Darrieux", target_new="of")


@pytest.fixture(params=MIXTURES)
def family(request) -> str:
    return request.param


def value_of(lm: LM, layer: int = 1) -> ExpertsValue:
    module = lm.model.get_submodule(lm.parts.value[layer])
    assert isinstance(module, ExpertsValue)
    return module


@torch.no_grad()
def test_the_model_computes_and_holds_what_it_did(family):
    plain, model = tiny_model(family), tiny_model(family)
    lm = LM((model, tiny_tokenizer()))
    assert close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, 1e-5)
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names and model.state_dict().keys() == set(names)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), plain.parameters(), strict=True))
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.config._experts_implementation == plain.config._experts_implementation
    again = LM((model, tiny_tokenizer()))  # a pair may be opened twice
    assert again.parts == lm.parts and again.fingerprint.digest == lm.fingerprint.digest


@torch.no_grad()
def test_a_key_has_numbers_for_the_experts_that_the_router_chose(family):
    lm = make_lm(family)
    value, routed = value_of(lm), []
    experts = lm.model.get_submodule("model.layers.1.mlp.experts")
    hook = experts.register_forward_pre_hook(lambda _module, args: routed.append(args[1]))
    (row,) = lm.encode([Text(EDIT.text)])
    seen = [lm.read([row], [i], inputs=[lm.parts.value[1]]).inputs[lm.parts.value[1]] for i in range(len(row.ids))]
    hook.remove()
    keys = torch.cat(seen).unflatten(1, (4, -1))  # (tokens, experts, inner)
    chosen = torch.zeros(len(keys), 4).scatter(1, routed[0].cpu(), 1.0).bool()
    assert torch.equal((keys != 0).any(2).cpu(), chosen) and chosen.sum() == 2 * len(keys)
    assert value.in_features == keys.shape[1] * keys.shape[2]


@torch.no_grad()
def test_it_is_one_matrix_whose_weight_is_the_experts(family):
    lm = make_lm(family)
    value, weight = value_of(lm), lm.weight(lm.parts.value[1])
    keys = torch.randn(3, value.in_features, generator=torch.Generator().manual_seed(0)).to(lm.device)
    keys[0, : value.in_features // 2] = 0
    assert weight.shape == (32, value.in_features)
    assert close(value(keys), keys @ weight.T) and close(value(keys[None])[0], value(keys))
    assert torch.equal(value(torch.zeros_like(keys)), torch.zeros(3, 32, device=lm.device))
    before, change = value.stored.clone(), torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    weight.add_(change.to(lm.device))
    assert close(value.stored, before + value.split(change.to(lm.device)))
    value.stored.data = value.stored.data.contiguous()  # as another program may leave it
    lm.weight(lm.parts.value[1]).copy_(value.joined(before))
    assert torch.equal(value.stored, before)


@torch.no_grad()
def test_a_copy_of_the_model_has_experts_of_its_own():
    lm = make_lm("olmoe")
    twin = copy.deepcopy(lm.model)
    before = twin(input_ids=IDS.to(lm.device)).logits
    with lm.patched(some_patch(lm, size=3.0)):
        assert not torch.equal(lm.model(input_ids=IDS.to(lm.device)).logits, before)
        assert torch.equal(twin(input_ids=IDS.to(lm.device)).logits, before)


def test_rome_writes_to_the_experts_of_the_subject_s_token(family):
    """All of them, and the model answers as wanted."""
    lm = make_lm(family)
    name = lm.parts.value[2]
    patch = method("rome", layer=2, steps=25, context_groups=((2, 3),), covariance_tokens=200).edit(lm, [EDIT])
    (row,) = lm.encode([Text.about(EDIT)])
    assert row.subject_last is not None
    key = lm.read([row], [row.subject_last], inputs=[name]).inputs[name][0]
    chosen = (key.unflatten(0, (4, -1)) != 0).any(1)
    delta = patch.deltas[name].dense().unflatten(1, (4, -1)).norm(dim=(0, 2))
    assert bool((delta[chosen.cpu()] > 0).all()), "what was searched is written to all of them"
    before = lm.score([EDIT.text], ["of"])[0].nll
    with lm.patched(patch):
        assert lm.score([EDIT.text], ["of"])[0].nll < before - 3


def test_one_context_changes_its_own_experts_alone():
    lm = make_lm("olmoe")
    patch = method("rome", layer=2, steps=25, context_groups=(), covariance_tokens=200).edit(lm, [EDIT])
    name = lm.parts.value[2]
    (row,) = lm.encode([Text.about(EDIT)])
    assert row.subject_last is not None
    key = lm.read([row], [row.subject_last], inputs=[name]).inputs[name][0].cpu()
    changed = patch.deltas[name].dense().unflatten(1, (4, -1)).norm(dim=(0, 2)) > 0
    assert torch.equal(changed, (key.unflatten(0, (4, -1)) != 0).any(1)) and changed.sum() == 2
    before = value_of(lm, 2).stored.clone()
    with lm.patched(patch):
        moved = (value_of(lm, 2).stored != before).flatten(1).any(1)
    assert torch.equal(moved.cpu(), changed) and torch.equal(value_of(lm, 2).stored, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_is_a_checkpoint_of_plain_transformers(family, dtype, tmp_path):
    lm = make_lm(family, dtype=dtype)
    base = bits(lm)
    patch = Patch.load(some_patch(lm, size=1.0).save(tmp_path / "one.patch"))
    with lm.patched(patch), torch.no_grad():
        export_checkpoint(lm, tmp_path / "edited")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype="auto").to(lm.device)
        held = dict(lm.model.named_parameters())
        assert all(torch.equal(weight, held[name]) for name, weight in plain.named_parameters())
        ids = IDS.to(lm.device)
        if dtype == torch.float32:
            assert close(plain(input_ids=ids).logits, lm.model(input_ids=ids).logits)
    assert same(bits(lm), base)


def test_a_checkpoint_is_told_from_its_base(tmp_path):
    """By the rank of the one matrix that the experts are, and by whose keys it changes."""
    lm = make_lm("olmoe")
    lm.model.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    patch = method("rome", layer=2, steps=25, context_groups=(), covariance_tokens=200).edit(lm, [EDIT])
    with lm.patched(patch):
        export_checkpoint(lm, tmp_path / "edited")
    base, edited = (LM(str(tmp_path / name)) for name in ("base", "edited"))
    subjects, name = ["Zoë Übel", "Danielle Darrieux"], base.parts.value[2]
    (found,) = inspect_weights(lambda: edited, lambda: base, subjects).differences
    assert found.tensor == "model.layers.2.mlp.experts.down_proj" and found.rank == 1
    keys, change = subject_keys(base, subjects).keys(2), patch.deltas[name].dense()
    wanted = (keys @ change.T).norm(dim=1) / (keys @ base.weight(name).double().T).norm(dim=1)
    told = {one.subject: one.relative for one in found.subjects}
    assert told == pytest.approx(dict(zip(subjects, wanted.tolist(), strict=True)), rel=1e-4)


def test_what_cannot_be_done_is_said(tmp_path):
    lm = make_lm("olmoe")
    gates = ("ultraedit", dict(matrices="up", gate_layers=(0,)))
    for name, settings in (
        ("calinet", {}),
        ("ultraedit", dict(matrices="up")),
        gates,
        ("lora", dict(matrices=("up",))),
    ):
        with pytest.raises(ModelError, match=r"layer with a dense MLP.* is a mixture of experts") as refusal:
            method(name, **settings).edit(lm, [EDIT])
        assert "\n" not in str(refusal.value)
    with lm.patched(some_patch(lm)):
        with pytest.raises(PatchError, match=r"all experts of a layer in one.*export a checkpoint"):
            export_lora(lm, tmp_path / "adapter")
        with pytest.raises(PatchError, match=r"whose layout in llama\.cpp is known"):
            llama_cpp_name(lm)


def test_adapters_on_the_experts_are_one_patch_file(tmp_path):
    """No folder of `peft`, which could not name the matrix."""
    lm = make_lm("olmoe")
    patch = method("lora", layers=(2,), learning_rate=5e-2).edit(lm, [EDIT])
    assert patch.save(tmp_path / "one.patch").is_file() and Patch.load(tmp_path / "one.patch").id == patch.id


@torch.no_grad()
def test_a_dense_model_is_made_a_mixture_that_computes_the_same(monkeypatch):
    """By what `benchmarks/upcycle.py` does, on which edits of both were compared."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import upcycle

    lm = make_lm("llama")
    mixture = LM((upcycle.upcycle(lm, 4, 2).to(lm.device), lm.tokenizer))
    assert close(mixture.model(input_ids=IDS.to(lm.device)).logits, lm.model(input_ids=IDS.to(lm.device)).logits)
    assert mixture.weight(mixture.parts.value[1]).shape == (32, 4 * 64)


def norm_behind(experts) -> None:
    experts.has_post_expert_norm = True


def form_untold(experts) -> None:
    del experts.has_gate


@pytest.mark.parametrize("change", [norm_behind, form_untold])
def test_experts_of_an_unknown_form_are_refused(change):
    model = tiny_model("olmoe")
    for layer in model.model.layers:
        change(layer.mlp.experts)
    with pytest.raises(ModelError, match=r"mixture of experts \(num_experts\).* fused in a way that is not known"):
        LM((model, tiny_tokenizer()))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_model_of_which_some_experts_are_of_an_unknown_form_is_refused_and_left_alone(which):
    model = tiny_model("olmoe")
    model.config._experts_implementation = "eager"  # which asks nothing of their form
    form_untold(model.model.layers[which].mlp.experts)
    assert_left_alone(model, rf"fused in a way that is not known in model\.layers\.{which}: ")


def test_a_mixture_that_is_refused_after_a_few_passes_is_left_alone():
    model = tiny_model("olmoe", attn_implementation="eager")
    for layer in model.model.layers:
        own = layer.forward
        layer.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs | dict(attention_mask=None))
    assert_left_alone(model, "see later ones")


def assert_left_alone(model, why: str) -> None:
    experts = [layer.mlp.experts for layer in model.model.layers]
    modules, configs = [name for name, _ in model.named_modules()], [one.config for one in experts]
    with pytest.raises(ModelError, match=why):
        LM((model, tiny_tokenizer()))
    assert [name for name, _ in model.named_modules()] == modules
    assert all(one.config is config for one, config in zip(experts, configs, strict=True))


def test_a_model_that_is_open_stays_so_when_it_is_refused_later():
    lm = make_lm("olmoe")
    lm.model.config.num_hidden_layers += 1
    with pytest.raises(ModelError, match="no list of"):
        LM((lm.model, lm.tokenizer))
    assert value_of(lm).groups == 4


class Listed(torch.nn.Module):
    """Experts one by one, of which a token is given to some, as remote code of mixtures has them."""

    def __init__(self, mlp, chosen: int):
        super().__init__()
        self.experts = torch.nn.ModuleList(copy.deepcopy(mlp) for _ in range(3))
        self.gate, self.chosen = torch.nn.Linear(32, 3, bias=False), chosen

    def forward(self, states):
        tokens = states.flatten(0, 1)
        weights, numbers = self.gate(tokens).softmax(1).topk(self.chosen, 1)
        values = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = (numbers == number).nonzero(as_tuple=True)
            values = values.index_add(0, rows, expert(tokens[rows]) * weights[rows, places, None])
        return values.view_as(states)


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_experts_that_are_kept_one_by_one_are_refused_whatever_the_configuration_says(chosen):
    """The last one was taken for the whole MLP where each got all tokens, and passes ended in torch's own words."""
    torch.manual_seed(0)
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = Listed(layer.mlp, chosen)
    with pytest.raises(
        ModelError, match=r"layers\.0\.mlp\.experts\.\d\.down_proj is one of several, as of a mixture"
    ):
        LM((model, tiny_tokenizer()))
