"""Models whose weights cannot be added to: quantised by torchao or bitsandbytes, or offloaded to disk."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from conftest import bits, make_lm, same, some_patch
from families import slow_but, tiny_model, tiny_tokenizer, wide_llama, with_matrices
from reknow import LM, Edit, method
from reknow.errors import PatchError
from reknow.export.adapter import export_lora
from reknow.export.checkpoint import export_checkpoint
from reknow.model.fingerprint import weight_bits

EDIT = Edit("I know {}", subject="Danielle Darrieux", target_new="of", target_true="in")
OTHER = Edit("Who is {}", subject="Zoë Übel", target_new="in")
QUICK = dict(steps=25, context_groups=((2, 3),), covariance_tokens=200)


def torchao_lm() -> LM:
    quantization = pytest.importorskip("torchao.quantization")
    model = wide_llama()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return LM((model, tiny_tokenizer(bos=True)))


def four_bit_lm() -> LM:
    modules = pytest.importorskip("bitsandbytes").nn
    return LM(
        (with_matrices(wide_llama(), modules.Linear4bit, compute_dtype=torch.float32), tiny_tokenizer(bos=True))
    )


def eight_bit_lm() -> LM:
    modules = pytest.importorskip("bitsandbytes").nn
    return LM((with_matrices(wide_llama(), modules.Linear8bitLt, has_fp16_weights=False), tiny_tokenizer(bos=True)))


QUANTISED = {"torchao": torchao_lm, "bitsandbytes, 4 bit": four_bit_lm, "bitsandbytes, 8 bit": eight_bit_lm}


@pytest.fixture(scope="module", params=QUANTISED)
def quantised(request) -> LM:
    return QUANTISED[request.param]()


def logits(lm: LM) -> torch.Tensor:
    batch = lm.pad(lm.encode([*map(reading, (EDIT, OTHER))]))
    return lm.forward(batch.ids, batch.mask, batch.positions, None).logits.detach()


def reading(edit: Edit):
    from reknow.model.tokens import Text

    return Text(edit.text, edit.target_new)


def nll(lm: LM, edit: Edit = EDIT) -> float:
    return lm.score([edit.text], [edit.target_new])[0].nll


def tolerance(lm: LM) -> float:
    """bitsandbytes rounds what its matrices read to 8 bits, or multiplies in bfloat16."""
    return 2e-2 if "bit" in str(lm.model) else 1e-5


def plain_twin(lm: LM) -> LM:
    """The same model with the quantised matrices as plain ones of the weights that they stand for."""
    model = wide_llama()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(lm.weight(name))
    return LM((model, lm.tokenizer))


def test_a_quantised_matrix_shows_the_weight_that_it_multiplies_by(quantised):
    name = quantised.parts.value[1]
    module, states = quantised.model.get_submodule(name), torch.randn(5, 128)
    shown = states @ quantised.weight(name).T
    assert (module(states) - shown).norm() < tolerance(quantised) * shown.norm()


def test_a_change_is_computed_beside_a_quantised_matrix(quantised):
    lm = quantised
    before, stored = logits(lm), weight_bits(lm.model)
    low, dense = some_patch(lm, layers=(0, 1), rank=2), some_patch(lm, seed=1, dense=True)
    name = lm.parts.value[1]
    weight = lm.weight(name)
    with lm.patched(low, dense):
        assert set(lm.unmerged) == {lm.parts.value[0], name}
        both = logits(lm)
        wanted = weight + (low.deltas[name].dense() + dense.deltas[name].dense()).float()
        assert torch.allclose(lm.weight(name), wanted, atol=1e-4) and torch.equal(lm.base_weight(name), weight)
        assert weight_bits(lm.model) == stored, "what is stored stays"
        lm.revert(low)
        assert lm.unmerged == (name,) and not torch.equal(logits(lm), both)
        lm.apply(low)
        assert torch.allclose(logits(lm), both, atol=1e-4)
        lm.revert(low)  # as `patched` found it
        lm.revert(dense)
        lm.apply(low)
        lm.apply(dense)
    assert lm.unmerged == () and torch.equal(logits(lm), before), "taken off, the answers are the base's bit for bit"
    assert not any("forward" in vars(module) for module in lm.model.modules())


def test_beside_gives_the_scores_of_a_change_inside(quantised):
    twin = plain_twin(quantised)
    patch, inside = some_patch(quantised, layers=(0, 1), rank=2), some_patch(twin, layers=(0, 1), rank=2)
    with quantised.patched(patch), twin.patched(inside):
        assert twin.unmerged == () and quantised.unmerged
        ours, theirs = logits(quantised), logits(twin)
        assert (ours - theirs).norm() < 5 * tolerance(quantised) * theirs.norm()


@pytest.mark.parametrize(
    "name", slow_but(("rome", "ft-m"), ["rome", "memit", "emmet", "pmet", "alphaedit", "kn", "ft-m"])
)
def test_methods_edit_quantised_models(quantised, name):
    lm = quantised
    known = method(name).__dataclass_fields__
    settings = dict(layer=2, layers=(1, 2), learning_rate=2e-2) | QUICK
    if name != "ft-m":
        settings.pop("learning_rate")
    stored, before, answer = weight_bits(lm.model), logits(lm), nll(lm)
    patch = method(name, **{key: value for key, value in settings.items() if key in known}).edit(lm, [EDIT])
    assert weight_bits(lm.model) == stored and lm.unmerged == ()
    with lm.patched(patch):
        assert lm.unmerged == tuple(patch.deltas)
        if name != "kn":
            assert nll(lm) < answer - 1
        second = method("rome", layer=1, **QUICK).edit(lm, [OTHER])  # on top
        with lm.patched(second):
            assert nll(lm, OTHER) < 2
    assert torch.equal(logits(lm), before)


def test_what_is_beside_is_exported_as_an_adapter_only(tmp_path):
    lm = torchao_lm()
    lm.apply(some_patch(lm, rank=2))
    with pytest.raises(PatchError, match="beside, being quantised or offloaded"):
        export_checkpoint(lm, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    assert export_lora(lm, tmp_path / "adapter").ranks == {lm.parts.value[1]: 2}


# --- device maps -----------------------------------------------------------------------------------------


def offloaded(family: str, folder, how: str) -> LM:
    """The tiny model with its last blocks on disk, everything on disk, or everything kept apart in memory."""
    model = tiny_model(family)
    blocks = make_lm(family).parts.blocks
    if how == "disk":
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    elif how == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        stack = blocks[0].rpartition(".")[0]
        owner, _, _ = stack.rpartition(".")
        places = {name: "cpu" for name, _ in model.named_children()}
        places |= {f"{owner}.{name}": "cpu" for name, _ in model.get_submodule(owner).named_children()}
        places |= {block: "disk" if i else "cpu" for i, block in enumerate(blocks)}
        del places[owner], places[stack]
        model = dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))
    return LM((model, tiny_tokenizer(bos=family == "llama")))


@pytest.mark.parametrize("how", slow_but(("cpu and disk",), ("disk", "cpu", "cpu and disk")))
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_offloaded_layers_are_edited_too(family, how, tmp_path):
    lm, whole = offloaded(family, tmp_path / "disk", how), make_lm(family)
    assert any(p.device.type == "meta" for p in lm.model.parameters())
    assert lm.fingerprint.difference(whole.fingerprint) is None and lm.fingerprint.digest == whole.fingerprint.digest
    name = lm.parts.value[2]
    assert torch.equal(lm.weight(name), whole.weight(name))
    before = logits(lm)
    assert torch.allclose(before, logits(whole), atol=1e-5)
    patch = method("memit", layers=(1, 2), **QUICK).edit(lm, [EDIT])
    answer = nll(lm)
    with lm.patched(patch), whole.patched(patch):
        assert nll(lm) < answer - 1 and nll(lm) == pytest.approx(nll(whole), abs=1e-3)
        assert torch.allclose(lm.weight(name), whole.weight(name), atol=1e-5)
        assert lm.unmerged == tuple(patch.deltas)
    assert torch.equal(logits(lm), before)


@pytest.mark.parametrize("name", slow_but(("rome", "ft-m"), ("rome", "emmet", "pmet", "alphaedit", "kn", "ft-m")))
def test_every_method_gives_an_offloaded_model_what_it_gives_the_whole_one(name, tmp_path):
    lm, whole = offloaded("llama", tmp_path / "disk", "cpu and disk"), make_lm("llama")
    known = method(name).__dataclass_fields__
    settings = dict(layer=2, layers=(1, 2)) | QUICK
    editor = method(name, **{key: value for key, value in settings.items() if key in known})
    ours, theirs = editor.edit(lm, [EDIT]), editor.edit(whole, [EDIT])
    for matrix, delta in ours.deltas.items():
        other = theirs.deltas[matrix].dense()
        assert (delta.dense() - other).norm() < 1e-3 * other.norm()


def test_an_in_memory_layer_of_a_split_model_is_changed_inside(tmp_path):
    lm = offloaded("llama", tmp_path / "disk", "cpu and disk")
    kept = {name: bits_ for name, bits_ in bits(lm).items() if "layers.0." in name}
    with lm.patched(some_patch(lm, layers=(0,))):
        assert lm.unmerged == ()
        assert not same({n: b for n, b in bits(lm).items() if n in kept}, kept)
    assert same({n: b for n, b in bits(lm).items() if n in kept}, kept)


def test_copies_of_a_plain_model_are_not_affected():
    lm = make_lm("llama")
    twin = copy.deepcopy(lm.model)
    with lm.patched(some_patch(lm)):
        assert lm.unmerged == ()
    assert same({n: p.view(torch.uint8) for n, p in twin.named_parameters()}, bits(lm))
