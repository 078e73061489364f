"""Faster forms of modules are the same functions up to rounding, and stand where nothing else does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from conftest import make_lm
from reknow.model import fast_modules as fast
from reknow.model.fast_modules import align_weights, fast_modules, product
from reknow.model.hooks import weight_replaced
from reknow.model.tokens import Text


def both_ways(module: nn.Module, states):
    """(outputs, gradient) of the module as it is and with its faster form."""
    found = []
    for model in (nn.Sequential(), nn.Sequential(module)):
        with fast_modules(model):
            outputs = module(states)
            found.append((outputs.detach(), *torch.autograd.grad(outputs.square().sum(), states)))
    return found


def with_random_bias(module):
    nn.init.normal_(module.bias)
    return module.requires_grad_(False)


MATRICES = {
    "linear": lambda: with_random_bias(nn.Linear(48, 80)),
    "no bias": lambda: nn.Linear(48, 80, bias=False).requires_grad_(False),
    "transposed": lambda: with_random_bias(Conv1D(80, 48)),
}


@pytest.mark.parametrize("activation", [NewGELUActivation, FastGELUActivation])
def test_gelu(activation):
    states = torch.linspace(-9, 9, 2001, requires_grad=True)
    (wanted, slope), (found, fast_slope) = both_ways(activation(), states)
    assert not torch.equal(fast_slope, slope), "the other code ran"
    assert torch.allclose(found, wanted, atol=1e-6) and torch.allclose(fast_slope, slope, atol=1e-4)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("shape", [(48,), (5, 48), (3, 2, 48), (0, 48)], ids=str)
def test_products(name, shape):
    matrix, states = MATRICES[name](), torch.randn(shape, requires_grad=True)
    (wanted, slope), (found, fast_slope) = both_ways(matrix, states)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-5) and torch.allclose(fast_slope, slope, atol=1e-4)
    with fast_modules(nn.Sequential(matrix)):
        outputs = matrix(states)
        outputs += 1  # as adapters do


def test_states_need_not_lie_in_one_piece():
    weight, states = torch.randn(32, 16), torch.randn(4, 16, 7).mT[:, 1:5]
    assert torch.allclose(product(states, weight), states @ weight.T, atol=1e-5)
    assert torch.allclose(
        product(states[:1].expand(3, 4, 16), weight), states[:1].expand(3, 4, 16) @ weight.T, atol=1e-5
    )


def test_a_gradient_of_a_gradient():
    weight, states = torch.randn(8, 5), torch.randn(3, 5, requires_grad=True)

    def second(outputs):
        (slope,) = torch.autograd.grad(outputs.pow(3).sum(), states, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), states)[0]

    assert torch.allclose(second(product(states, weight)), second(states @ weight.T), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("matrix", MATRICES)
def test_other_derivatives_are_torchs_own(matrix):
    matrix, states = MATRICES[matrix](), torch.randn(3, 48)
    direction = torch.randn_like(states)
    wanted = matrix(direction) - matrix(torch.zeros_like(direction))
    with fast_modules(nn.Sequential(matrix)):
        _, tangent = torch.func.jvp(matrix, (states,), (direction,))
        slope = torch.func.grad(lambda states: (matrix(states) * wanted).sum())(states)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(matrix(forward_ad.make_dual(states, direction))).tangent
    assert torch.allclose(tangent, wanted, atol=1e-4) and torch.allclose(dual, wanted, atol=1e-4)
    assert (slope * direction).sum().item() == pytest.approx(wanted.square().sum().item(), rel=1e-3)


def seen(monkeypatch) -> list[int]:
    """Gets an entry for each product that oneDNN makes."""
    made: list[int] = []
    own = fast.product
    monkeypatch.setattr(fast, "product", lambda *args: made.append(1) or own(*args))
    return made


def test_only_what_onednn_can_have_goes_there(monkeypatch):
    made, states = seen(monkeypatch), torch.randn(2, 48)
    plain = nn.Linear(48, 80).requires_grad_(False)
    with fast_modules(nn.Sequential(plain)):
        plain(states)
        assert len(made) == 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert plain(states).dtype == torch.bfloat16
        plain.to(torch.bfloat16)(states.bfloat16())
        trained = plain.float().requires_grad_()
        trained(states).sum().backward()
        assert trained.weight.grad is not None
    plain.requires_grad_(False)
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    with fast_modules(nn.Sequential(plain)):
        plain(states)
    assert len(made) == 1


def test_what_stands_in_for_a_matrix_stays(monkeypatch):
    made, matrix, weight = seen(monkeypatch), MATRICES["no bias"](), torch.randn(80, 48)
    states = torch.randn(2, 48)
    with weight_replaced(matrix, weight), fast_modules(nn.Sequential(matrix)):
        assert torch.allclose(matrix(states), states @ weight.T, atol=1e-5) and not made
    assert torch.allclose(matrix(states), states @ matrix.weight.T, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_runs_with_them(family, monkeypatch):
    lm = make_lm(family)
    batch = lm.pad(lm.encode([Text("The capital of Peru is")]))
    made = seen(monkeypatch)
    found = lm.forward(batch.ids, batch.mask, batch.positions, None).logits
    assert made
    with torch.no_grad():
        wanted = lm.model(input_ids=batch.ids, attention_mask=batch.mask).logits
    assert torch.allclose(found, wanted, atol=1e-4)


def test_weights_are_moved_to_where_a_line_of_the_cache_begins(monkeypatch):
    matrix, tied = nn.Linear(16, 8).requires_grad_(False), nn.Linear(16, 8)
    values = torch.randn(8 * 16 + 10)
    matrix.weight.data, tied.weight = values[10:].view(8, 16), matrix.weight
    monkeypatch.setattr(fast, "_MOST_MOVED", 4 * 8 * 16 - 1)
    align_weights(nn.Sequential(matrix, tied))
    assert matrix.weight.data_ptr() % 64, "a large model stays in the pages of its file"
    monkeypatch.undo()
    align_weights(nn.Sequential(matrix, tied))
    assert matrix.weight.data_ptr() % 64 == 0 and torch.equal(matrix.weight, values[10:].view(8, 16))
    assert tied.weight is matrix.weight
