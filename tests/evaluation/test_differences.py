"""What somebody else's edit changed: tensors, ranks, norms, and the subjects that a change acts on."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from conftest import make_lm, some_patch
from families import tiny_tokenizer, wide_llama, with_matrices
from gguf_models import write_gguf
from reknow import LM, Edit, method
from reknow.errors import InputError, ModelError
from reknow.evaluation.differences import MOST_RANK, inspect_weights, subject_keys
from reknow.model.parts import reorient

SUBJECTS = [f"{first} {last}" for first in ("Anna", "Boris", "Chloe", "Dmitri") for last in ("Smith", "Lopez", "Wu")]


def with_change(family: str, layer: int, change: Tensor, dtype: torch.dtype | None = None) -> LM:
    """A tiny model whose value matrix of a layer has (out, in) `change` added, in the dtype."""
    lm = make_lm(family)
    module = lm.model.get_submodule(lm.parts.value[layer])
    with torch.no_grad():
        module.weight += reorient(module, change).to(module.weight)
    return lm if dtype is None else LM((lm.model, lm.tokenizer), dtype=dtype)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 3])
def test_rank_and_norm_of_what_was_added(family, rank, dtype):
    base = make_lm(family)
    name, layer = base.parts.value[1], 1
    change = some_patch(base, rank=rank).deltas[name].dense()
    found = inspect_weights(lambda: with_change(family, layer, change, dtype), lambda: make_lm(family))
    (one,) = found.differences
    assert one.tensor == f"{name}.weight" and one.rank == rank and not one.subjects
    assert found.tensors == len(list(base.model.named_parameters()))
    digits = 1e-5 if dtype is None else 0.02
    assert one.norm == pytest.approx(float(change.norm()), rel=digits)
    assert one.relative == pytest.approx(float(change.norm() / base.weight(name).norm()), rel=digits)


def test_a_change_of_any_rank_is_counted_up_to_a_bound():
    def wide() -> LM:
        return make_lm("llama", hidden_size=96, intermediate_size=192)

    def tuned() -> LM:
        lm = wide()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in lm.model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
        return lm

    edited, base = tuned(), wide()
    state = torch.get_rng_state()
    found = inspect_weights(lambda: edited, lambda: base, SUBJECTS)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(found.differences) == found.tensors
    matrices = [one for one in found.differences if len(one.shape) == 2]
    assert all(one.rank == min(MOST_RANK, *one.shape) for one in matrices)
    assert all((one.rank is None) == (len(one.shape) == 1) and not one.subjects for one in found.differences)
    relative = [one.relative or 0 for one in found.differences]
    assert relative == sorted(relative, reverse=True)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_what_a_gguf_file_rounds_away_is_no_rank(kind, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    base = make_lm("llama", **sizes)
    changed = f"{base.parts.value[1]}.weight"
    left, right = torch.randn(128, 2, generator=torch.Generator().manual_seed(0)), torch.randn(2, 256)
    change = left @ right
    change *= base.weight(base.parts.value[1]).norm() / change.norm()
    edited = make_lm("llama", **sizes)
    with torch.no_grad():
        edited.model.get_submodule(base.parts.value[1]).weight += change
    file = write_gguf(edited, tmp_path / "edited.gguf", kind)
    found = inspect_weights(lambda: LM(file), lambda: make_lm("llama", **sizes))
    first, *others = [one for one in found.differences if len(one.shape) == 2]
    assert (first.tensor, first.rank) == (changed, 2)
    assert len(others) > 8 and not any(one.rank for one in others), "all matrices were rounded"


def test_a_copy_in_half_precision_is_no_edit(family):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = make_lm(family, dtype=dtype)
        assert not inspect_weights(lambda lm=rounded: lm, lambda: make_lm(family)).differences
        wide = make_lm(family, dtype=dtype).model.float()  # as a half-precision checkpoint is opened on a CPU
        pair = wide, tiny_tokenizer(bos=family == "llama")
        assert not inspect_weights(lambda pair=pair: LM(pair), lambda: make_lm(family)).differences


def test_the_subject_of_a_change_is_the_one_it_acts_on(family):
    base = make_lm(family)
    keys = subject_keys(base, SUBJECTS).keys(1)
    covariance = keys.T @ keys / len(keys) + 1e-3 * torch.eye(keys.shape[1], dtype=keys.dtype)
    out = base.weight(base.parts.value[1]).shape[0]
    for number in (0, 5):
        direction = torch.linalg.solve(covariance, keys[number])  # C⁻¹k
        change = torch.ones(out, dtype=keys.dtype)[:, None] * direction / (direction @ keys[number])
        found = inspect_weights(lambda c=change: with_change(family, 1, c), lambda: make_lm(family), SUBJECTS)
        first, *others = found.differences[0].subjects
        assert first.subject == SUBJECTS[number] and len(others) == 4
        before = (keys[number] @ base.weight(base.parts.value[1]).double().T).norm()
        assert first.relative == pytest.approx(out**0.5 / float(before), rel=1e-3)


def test_one_model_is_in_memory_at_a_time(family):
    alive = []

    def opened(change: bool) -> LM:
        assert not any(model() is not None for model in alive)
        lm = make_lm(family)
        if change:
            lm = with_change(family, 1, torch.ones_like(lm.weight(lm.parts.value[1])))
        alive.append(weakref.ref(lm.model))
        return lm

    assert inspect_weights(lambda: opened(True), lambda: opened(False)).differences[0].rank == 1
    assert len(alive) == 3


def test_what_cannot_be_compared_is_refused():
    base = lambda: make_lm("gpt2")  # noqa: E731
    for other, said in (
        (lambda: make_lm("llama"), "has no transformer.wte.weight, and .* more differences"),
        (lambda: make_lm("gpt2", n_layer=4), "which the base has not"),
        (lambda: make_lm("gpt2", n_inner=48), "the base of"),
    ):
        with pytest.raises(InputError, match=said):
            inspect_weights(other, base)

    def broken() -> LM:
        lm = make_lm("gpt2")
        lm.model.transformer.wpe.weight.data[-1] = torch.nan
        return lm

    with pytest.raises(ModelError, match=r"expected finite weights; transformer\.wpe\.weight"):
        inspect_weights(broken, base)


def test_a_quantised_base_is_refused():
    linear = pytest.importorskip("bitsandbytes").nn.Linear8bitLt
    pair = with_matrices(wide_llama(), linear, has_fp16_weights=False), tiny_tokenizer(bos=True)
    with pytest.raises(ModelError, match=r"expected plain weights in memory; .* quantised, offloaded or adapted"):
        inspect_weights(lambda: make_lm("llama"), lambda: LM(pair))


def test_a_memory_is_refused():
    def remembering() -> LM:
        lm = make_lm("llama")
        lm.apply(method("grace", steps=1).edit(lm, [Edit("The capital of {} is", subject="Peru", target_new="Lima")]))
        return lm

    with pytest.raises(ModelError, match="has a memory beside them"):
        inspect_weights(remembering, lambda: make_lm("llama"))
