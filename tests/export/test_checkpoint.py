"""Exports, opened by the programs they are for: plain transformers and plain peft."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_lm
from reknow import FT, ROME, Edit
from reknow.errors import InputError, PatchError
from reknow.export.adapter import export_lora
from reknow.export.checkpoint import export_checkpoint
from reknow.files.atomic import atomic_write_folder

IDS = torch.tensor([[10, 40, 80, 120, 200]])
METHOD = ROME(layer=1, steps=5, context_groups=(), covariance_tokens=0)


def edited(lm, edit):
    lm.apply(METHOD.edit(lm, [edit]))
    lm.apply(METHOD.edit(lm, [Edit("The capital of {} is", subject="Peru", target_new="Paris")]))
    return lm


def saved_base(lm, folder):
    with lm.unpatched():
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    return folder


def test_a_checkpoint_gives_the_same_logits(lm, edit, tmp_path):
    edited(lm, edit)
    export_checkpoint(lm, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert torch.equal(model(IDS).logits, lm.model(IDS).logits)
    assert tokenizer("The capital")["input_ids"] == lm.tokenizer("The capital")["input_ids"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt", "phi3"])
def test_an_adapter_gives_the_same_logits_in_peft(family, edit, tmp_path):
    lm = edited(make_lm(family), edit)
    base = saved_base(lm, tmp_path / "base")
    report = export_lora(lm, tmp_path / "adapter")
    assert set(report.ranks.values()) == {2}
    assert report.error == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.allclose(model(IDS).logits, lm.model(IDS).logits, atol=1e-4)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(IDS).logits, lm.model(IDS).logits, atol=1e-4)


def test_matrices_of_different_rank_share_an_adapter(edit, tmp_path):
    lm = edited(make_lm("llama"), edit)
    lm.apply(ROME(layer=0, steps=5, context_groups=(), covariance_tokens=0).edit(lm, [edit]))
    base = saved_base(lm, tmp_path / "base")
    assert sorted(export_lora(lm, tmp_path / "adapter").ranks.values()) == [1, 2]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.allclose(model(IDS).logits, lm.model(IDS).logits, atol=1e-4)


def test_a_higher_rank_is_refused_or_truncated(edit, tmp_path):
    lm = make_lm("gpt2")
    lm.apply(FT(layer=1, steps=3).edit(lm, [edit]))
    with pytest.raises(PatchError, match="rank 4 at most"):
        export_lora(lm, tmp_path / "adapter", max_rank=4)
    with pytest.raises(InputError, match="max_rank of at least 1"):
        export_lora(lm, tmp_path / "adapter", max_rank=0, truncate=True)
    assert not (tmp_path / "adapter").exists()
    report = export_lora(lm, tmp_path / "adapter", max_rank=4, truncate=True)
    assert set(report.ranks.values()) == {4}
    (delta,) = lm.patches[0].deltas.values()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (next(t for n, t in tensors.items() if part in n) for part in ("lora_A", "lora_B"))
    lost = (delta.dense() - (b @ a).double()).norm() / delta.norm()
    assert report.error == pytest.approx(float(lost), rel=1e-4)


def test_nothing_is_overwritten_or_half_written(edit, tmp_path, monkeypatch):
    lm = edited(make_lm("gpt2"), edit)
    export_lora(lm, tmp_path / "adapter")
    with pytest.raises(InputError, match="exists"):
        export_lora(lm, tmp_path / "adapter")
    before = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reknow.patching.peft_folder.save_file", full)
    with pytest.raises(InputError, match="No space left"):
        export_lora(lm, tmp_path / "adapter", overwrite=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_an_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    old = tmp_path / "adapter"
    old.mkdir()
    (old / "file").write_text("old")
    rename = os.rename

    def interrupted(source, target):
        if Path(target) == old and Path(source).parent.name == "new":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("reknow.files.atomic._exchange", lambda *_: False)  # as where there is no such step
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_folder(old, lambda new: None, overwrite=True)
    assert (old / "file").read_text() == "old" and list(tmp_path.iterdir()) == [old]


def test_an_unedited_model_has_no_adapter(tmp_path):
    with pytest.raises(PatchError, match="got none"):
        export_lora(make_lm("gpt2"), tmp_path / "adapter")
