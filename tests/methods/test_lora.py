"""LoRA, AdaLoRA and QLoRA: the factors are what peft's layers computed, and the model is left as it was."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from conftest import make_lm
from families import CORE_FAMILIES, slow_but
from reknow import Edit, Patch, method
from reknow.errors import InputError, MissingExtra, PatchError
from reknow.export.adapter import export_lora
from reknow.methods import lora
from reknow.patching.deltas import LowRank

pytest.importorskip("peft")

MATRICES = ("value", "up", "attention_out")


@pytest.mark.parametrize("family", slow_but(("llama",), CORE_FAMILIES))
@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_the_answer_becomes_likelier_and_the_model_is_left_alone(family, name, edit):
    lm = make_lm(family)
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    modules, attributes = dict(lm.model.named_modules()), set(vars(lm.model))
    state, first = torch.get_rng_state(), lm.score([edit.text], ["English"])[0].nll
    patch = method(name, matrices=MATRICES, layers=(1, 2), rank=4, learning_rate=2e-2).edit(lm, [edit])
    assert dict(lm.model.named_modules()) == modules and set(vars(lm.model)) == attributes
    assert all(torch.equal(before[name], p) and not p.requires_grad for name, p in lm.model.named_parameters())
    assert torch.equal(state, torch.get_rng_state())
    matrices = {n for i in (1, 2) for n in (lm.parts.value[i], lm.parts.attention_out[i], *lm.parts.mlp_in[i])}
    assert set(patch.deltas) == matrices if name == "lora" else set(patch.deltas) <= matrices
    assert all(isinstance(delta, LowRank) for delta in patch.deltas.values())
    with lm.patched(patch):
        assert lm.score([edit.text], ["English"])[0].nll < first - 1


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_the_patch_computes_what_peft_computed(lm, edit, name, monkeypatch):
    """The logits of peft's model at the end of training are those of the patched model."""
    last = {}
    original = lora.read_factors

    def factors(layer):
        if not last:
            with torch.no_grad():
                last["logits"] = lm.model(torch.tensor([[5, 6, 7, 8]])).logits
        return original(layer)

    monkeypatch.setattr(lora, "read_factors", factors)
    patch = method(name, matrices=MATRICES, learning_rate=2e-2, alpha=5.0, rank=3).edit(lm, [edit])
    with lm.patched(patch), torch.no_grad():
        ours = lm.model(torch.tensor([[5, 6, 7, 8]])).logits
        unedited = last["logits"]
    assert torch.allclose(ours, unedited, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(lm.model(torch.tensor([[5, 6, 7, 8]])).logits, unedited, atol=1e-2)


def test_the_patch_is_an_adapter_folder_of_peft(lm, edit, tmp_path):
    from peft import PeftModel

    patch = method("lora", matrices=MATRICES, rank=3, learning_rate=2e-2).edit(lm, [edit])
    assert Patch.load(patch.save(tmp_path / "lora.patch")).id == patch.id
    ids = torch.tensor([[5, 6, 7, 8]])
    with lm.patched(patch), torch.no_grad():
        export_lora(lm, tmp_path / "adapter")
        edited = lm.model(ids).logits
    tuned = PeftModel.from_pretrained(lm.model, str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.allclose(tuned(ids).logits, edited, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_a_memory_answers_in_training_as_it_will(name, lm, edit):
    settings = dict(layers=(1,), steps=3, rank=2)
    alone = method(name, **settings).edit(lm, [edit]).notes["losses"]
    lm.apply(method("grace", layer=2, steps=3, epsilon=1e-6).edit(lm, [Edit("What is", target_new="Lima")]))
    assert method(name, **settings).edit(lm, [edit]).notes["losses"] == pytest.approx(alone, rel=1e-5)
    lm.apply(method("grace", layer=2, steps=3).edit(lm, [edit]))
    first = method(name, **settings).edit(lm, [edit]).notes["losses"][0]
    if name == "lora":  # AdaLoRA's losses have a term of their own
        assert first == pytest.approx(lm.score([edit.text], [edit.target_new])[0].nll, rel=1e-5)
    assert alone[0] - first > 0.1


def test_several_edits_share_one_adapter(lm, edit):
    other = type(edit)("The capital of {} is", subject="Peru", target_new="Paris")
    patch = method("lora", learning_rate=3e-2, matrices=MATRICES, layers=(0, 1, 2), steps=60).edit(lm, [edit, other])
    with lm.patched(patch):
        scores = lm.score([edit.text, other.text], ["English", "Paris"])
    assert all(all(score.correct) for score in scores)


def test_adalora_shares_the_rank_out(lm, edit):
    patch = method("adalora", rank=4, matrices=MATRICES, layers=(0, 1, 2), learning_rate=2e-2).edit(lm, [edit])
    matrices = [n for i in range(3) for n in (lm.parts.value[i], lm.parts.attention_out[i], *lm.parts.mlp_in[i])]
    ranks = [delta.rank for delta in patch.deltas.values()]
    assert sum(ranks) == 4 * len(matrices) and 0 not in ranks  # a matrix left without any rank is not in the patch
    assert len(set(ranks)) > 1


def test_bad_settings_are_refused():
    for settings in ({"matrices": ("down",)}, {"matrices": ()}, {"rank": 0}, {"steps": 0}):
        with pytest.raises(InputError, match="got"):
            method("lora", **settings)


@pytest.mark.parametrize(("name", "package"), [("lora", "peft"), ("qlora", "bitsandbytes")])
def test_a_missing_package_is_named_with_its_extra(lm, edit, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.functional", None)
    modules = dict(lm.model.named_modules())
    with pytest.raises(MissingExtra, match=rf"reknow\[{name}\]"):
        method(name).edit(lm, [edit])
    assert dict(lm.model.named_modules()) == modules


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_qlora_trains_against_rounded_weights(lm, edit):
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    patch = method("qlora", matrices=MATRICES, learning_rate=2e-2).edit(lm, [edit])
    assert all(torch.equal(before[name], p) for name, p in lm.model.named_parameters())
    plain = method("lora", matrices=MATRICES, learning_rate=2e-2).edit(lm, [edit])
    assert patch.notes["losses"][0] != pytest.approx(plain.notes["losses"][0], rel=1e-6)
    first = lm.score([edit.text], ["English"])[0].nll
    with lm.patched(patch):
        assert lm.score([edit.text], ["English"])[0].nll < first - 1


@pytest.mark.parametrize("name", ["lora", "adalora"])
def test_the_saved_patch_is_the_folder_that_peft_loads(lm, edit, name, tmp_path):
    from peft import PeftModel

    patch = method(name, matrices=MATRICES, layers=(1, 2), rank=3, learning_rate=2e-2).edit(lm, [edit])
    folder = patch.save(tmp_path / "x.patch")
    again = Patch.load(folder)
    assert again.id == patch.id and again.edits == patch.edits and again.notes == patch.notes
    assert patch.save(folder) == folder and [path.name for path in tmp_path.iterdir()] == ["x.patch"]
    ids = torch.tensor([[5, 6, 7, 8]])
    with lm.patched(again), torch.no_grad():
        ours = lm.model(ids).logits
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(lm.model, str(folder))(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(PatchError, match="broken"):
        Patch.load(folder)


def test_a_folder_of_other_things_is_not_overwritten(lm, edit, tmp_path):
    patch = method("lora", layers=(1,), steps=2).edit(lm, [edit])
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.csv").write_text("years of work")
    with pytest.raises(InputError, match="holds something else"):
        patch.save(tmp_path / "results")
    assert (tmp_path / "results" / "table.csv").read_text() == "years of work"
    for name in ("empty", "patch"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "patch").write_text("a file")
        for _ in range(2):
            assert Patch.load(patch.save(tmp_path / name)).id == patch.id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "patch", "results"]
