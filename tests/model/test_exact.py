"""Float64 is computed where there is some, never on Apple's mps, of which shapes and places can be tried here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import reknow
from reknow.editing.solvers import _columns, rank_one
from reknow.editing.triangle import Triangle
from reknow.methods.calinet import fact_keys
from reknow.model.exact import exact, exact_device
from reknow.patching.deltas import Dense, LowRank, add_deltas, as_delta, sum_deltas

SOURCE = Path(reknow.__file__).parent


class NoDoubles(TorchDispatchMode):
    """Refuses what mps refuses: a tensor in float64 on it."""

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "mps" and tensor.dtype == torch.float64:
                raise TypeError(f"{function} gives float64 on mps")
        return found


@pytest.fixture
def apple():
    """Tensors on mps have a shape, a dtype and a place, and nothing in them."""
    with FakeTensorMode(), NoDoubles():
        yield torch.device("mps")


def test_where_it_is_computed():
    assert exact_device(torch.device("mps", 0)) == torch.device("cpu")
    for name in ("cpu", "cuda:1", "xpu"):
        assert exact_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_bits_are_those_of_a_cast(dtype):
    tensor = torch.randn(5, 7).to(dtype)
    assert torch.equal(exact(tensor), tensor.double()) and exact(tensor).dtype == torch.float64


def test_the_device_is_strict(apple):
    with pytest.raises(TypeError, match="float64 on mps"):
        torch.randn(3, device=apple).double()
    tensor = exact(torch.randn(3, device=apple))
    assert tensor.device.type == "cpu" and tensor.dtype == torch.float64


def test_patches_and_solvers_do_without(apple):
    left, right = torch.randn(8, 2, device=apple), torch.randn(2, 16, device=apple)
    low, dense = LowRank(left, right), Dense(torch.randn(8, 16, device=apple))
    base = torch.randn(8, 16, device=apple)
    for delta in (low, dense):
        assert delta.dense().dtype == torch.float64
        assert add_deltas(exact(base), [delta]).to(base).device == base.device
    assert sum_deltas([low, dense]).shape == (8, 16)
    triangle = Triangle.zeros(16, apple)
    triangle.add_products(exact(torch.randn(5, 16, device=apple)))
    factor = _columns(torch.randn(16, 16, device=apple))
    keys, residual = exact(torch.randn(3, 16, device=apple)), exact(torch.randn(3, 8, device=apple))
    solved = torch.linalg.solve(factor, keys.T).T
    assert as_delta(residual, solved).shape == (8, 16)
    assert rank_one(solved[0], keys[0], residual[0]).shape == (8, 16)
    assert fact_keys(torch.randn(3, 8, device=apple), torch.randn(20, 8, device=apple)).device.type == "mps"


def test_nothing_casts_to_float64_past_it():
    """`exact` casts; the others make tensors on a device that it names, on the CPU, or name what is in a file."""
    allowed = {"exact.py", "solvers.py", "refined.py", "triangle.py", "deltas.py", "tensors.py"}
    found = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr != "double", f"{file.name}:{node.lineno}"
                if node.attr == "float64":
                    found.add(file.name)
    assert found == allowed
