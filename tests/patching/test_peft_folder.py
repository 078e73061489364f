"""Adapter folders as engines read them that know one rank and one alpha: every edit arrives whole."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from conftest import make_lm, some_patch
from reknow import Edit, Patch
from reknow.export.adapter import export_lora
from reknow.methods import method
from reknow.patching.patch_files import write_patch
from reknow.patching.peft_folder import CONFIG, PREFIX, REST, WEIGHTS

IDS = torch.tensor([[10, 40, 80, 120, 200]])
EDIT = Edit("The capital of {} is", subject="Peru", target_new="Paris")


def logits_of_engine(lm, folder):
    """The base's logits with the adapter as llama.cpp adds it: B A times lora_alpha over each tensor's own rank."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    with lm.unpatched(), torch.no_grad():
        kept = {}
        for key in [key for key in tensors if ".lora_A." in key]:
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            right, left = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            weight = lm.weight(name)
            kept[name] = weight.clone()
            weight += left @ right * (config["lora_alpha"] / right.shape[0])
        found = lm.model(IDS).logits
        for name, weight in kept.items():
            lm.weight(name).copy_(weight)
    return found


def logits_of_a_server(lm, folder):
    """The base's logits with the adapter as a server adds it that knows one rank and one alpha, those of the
    configuration, makes room for that many rows, and reads nothing else of it."""
    config = json.loads((folder / CONFIG).read_text())
    assert not {"rank_pattern", "alpha_pattern", "use_rslora", "use_dora"} & {key for key in config if config[key]}
    rank, scale, tensors = config["r"], config["lora_alpha"] / config["r"], load_file(folder / WEIGHTS)
    hooks = []
    for name in config["target_modules"]:
        right, left = (tensors[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        rows, columns = torch.empty(rank, right.shape[1]), torch.empty(left.shape[0], rank)
        rows[:], columns[:] = right, left  # refuses another size
        change = lambda _, inputs, out, a=rows, b=columns: out + inputs[0] @ a.T @ b.T * scale  # noqa: E731
        hooks.append(lm.model.get_submodule(name).register_forward_hook(change))
    with lm.unpatched():
        found = lm.model(IDS).logits
    for hook in hooks:
        hook.remove()
    return found


def uneven(lm, *patches):
    for patch in patches:
        lm.apply(patch)
    return lm


CASES = {
    "ranks 1 and 2": lambda lm: uneven(lm, some_patch(lm, 1), some_patch(lm, 2, layers=(1, 2))),
    "ranks 1 and 4": lambda lm: uneven(lm, some_patch(lm, 1, rank=4, layers=(0,)), some_patch(lm, 2, layers=(2,))),
    "ranks 2, 3 and 8": lambda lm: uneven(
        lm, *(some_patch(lm, rank, rank=rank, layers=(layer,)) for layer, rank in enumerate((2, 8, 3)))
    ),
    "one matrix is cut": lambda lm: uneven(lm, some_patch(lm, 1, rank=3, dense=True), some_patch(lm, 2, layers=(0,))),
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("case", CASES)
def test_uneven_ranks_give_the_same_logits_in_every_engine(family, case, tmp_path):
    lm = CASES[case](make_lm(family))
    report = export_lora(lm, tmp_path / "adapter", max_rank=32)
    assert len(set(report.ranks.values())) > 1  # what the changes have, not what they are padded to
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {min(tensor.shape) for tensor in tensors.values()} == {max(report.ranks.values())}
    wanted = lm.model(IDS).logits
    assert torch.allclose(logits_of_engine(lm, tmp_path / "adapter"), wanted, atol=1e-4)
    assert torch.allclose(logits_of_a_server(lm, tmp_path / "adapter"), wanted, atol=1e-4)
    tuned = PeftModel.from_pretrained(make_lm(family).model, str(tmp_path / "adapter"))
    assert torch.allclose(tuned(IDS).logits, wanted, atol=1e-4)


def test_a_saved_adalora_patch_is_padded_and_loads_as_it_was(tmp_path):
    lm = make_lm("llama")
    patch = method("adalora", rank=4, layers=(0, 1, 2), matrices=("value", "attention_out"), steps=10).edit(
        lm, [EDIT]
    )
    ranks = {name: delta.rank for name, delta in patch.deltas.items()}
    assert len(set(ranks.values())) > 1
    again = Patch.load(patch.save(tmp_path / "folder"))
    assert again.id == patch.id and {name: delta.rank for name, delta in again.deltas.items()} == ranks
    with lm.patched(patch):
        wanted = lm.model(IDS).logits
    assert torch.allclose(logits_of_engine(lm, tmp_path / "folder"), wanted, atol=1e-4)


def test_the_configuration_is_what_peft_itself_would_write(tmp_path):
    lm = CASES["ranks 1 and 4"](make_lm("gpt2"))
    ranks = export_lora(lm, tmp_path / "adapter").ranks
    wanted = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=list(ranks),
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=lm.model.name_or_path or lm.name,
    )
    found = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert found.to_dict() == wanted.to_dict()
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text()).keys() <= wanted.to_dict().keys()


def test_a_folder_of_before_with_patterns_still_loads(tmp_path):
    """Its factors have each their own rank, and nothing says how far they are padded."""
    lm = make_lm("llama")
    patch = method("adalora", rank=4, layers=(0, 1, 2), matrices=("value", "attention_out"), steps=10).edit(
        lm, [EDIT]
    )
    folder = patch.save(tmp_path / "folder")
    ranks = {name: delta.rank for name, delta in patch.deltas.items()}
    tensors = {f"{PREFIX}{name}.lora_A.weight": delta.right for name, delta in patch.deltas.items()}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": delta.left for name, delta in patch.deltas.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    write_patch(replace(patch, deltas={}), folder / REST)  # which knew no digest of the other file
    config = json.loads((folder / CONFIG).read_text()) | {"rank_pattern": ranks, "alpha_pattern": ranks}
    (folder / CONFIG).write_text(json.dumps(config))
    assert Patch.load(folder).id == patch.id
    with lm.patched(patch):
        wanted = lm.model(IDS).logits
    assert torch.allclose(PeftModel.from_pretrained(lm.model, str(folder))(IDS).logits, wanted, atol=1e-4)


def test_a_patch_that_only_says_it_is_an_adapter_is_written_whole(tmp_path):
    lm = make_lm()
    notes = {"adapter": {"base_model_name_or_path": "x", "fan_in_fan_out": True}}
    for name, dense in (("matrix", True), ("nothing", False)):
        patch = some_patch(lm, dense=True)
        patch = replace(patch, notes=notes, deltas=patch.deltas if dense else {})
        assert Patch.load(patch.save(tmp_path / name)) == patch and (tmp_path / name).is_file()
