"""Faster forms of modules, the same functions up to rounding, which a model uses while it runs.

* Matrix products of float32 states on a CPU are oneDNN's. Torch gives them to MKL, which on processors that are not
  Intel's leaves half of the vector unit idle and needs long for few rows: on an AMD EPYC (family 26) oneDNN is 1.6
  times as fast at 10 rows, twice against a transposed matrix, as the way back has it, and 2.1 times at 400 rows;
  where only AVX2 is there, as fast or a little faster (docs/log.md).
* GELU by tanh is torch's, one pass over memory each way; transformers' takes eight, a fifth of the time of a small
  model's block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from reknow.model.hooks import forwards_replaced, own_forward

__all__ = ["align_weights", "fast_modules", "product"]

_SLOW_GELU = (NewGELUActivation, FastGELUActivation)
_CACHE_LINE = 64
"""Bytes."""
_MOST_MOVED = 2**32
"""Bytes of weights that are moved at most: those that stay lie in the pages of their file, which need not all be in
memory and which several processes share."""


def fast_modules(model: nn.Module):
    """While open, modules of the model that have a faster form use it; what something else stands in for does not."""
    forwards: dict[nn.Module, Callable] = {}
    onednn = _has_onednn()
    for module in model.modules():
        if own_forward(module) is not None:
            continue
        if onednn and _is_matrix(module):
            forwards[module] = partial(_forward, module, module.forward)
        elif isinstance(module, _SLOW_GELU):
            forwards[module] = partial(nn.functional.gelu, approximate="tanh")
    return forwards_replaced(forwards)


def product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """states @ weightᵀ + bias. weight: (out, in), float32 on a CPU, as all are; gradients reach the states alone."""
    if not (states.requires_grad and torch.is_grad_enabled()):
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    # Of more dimensions the operator gives a view, and those of a function of our own must not be added to in place.
    outputs: Any = _Product.apply(states.reshape(-1, states.shape[-1]), weight, bias)
    return outputs.view(*states.shape[:-1], len(weight))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(slopes[0], weight.T), None, None


def _has_onednn() -> bool:
    """Whether torch has oneDNN, switched on, and the operator that its own compiler calls."""
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled() and _has_operator()


@cache
def _has_operator() -> bool:
    """Whether torch has it, with the arguments of torch 2.6 to 2.13: it is no promise of torch's."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    names = [] if operator is None else [argument.name for argument in operator.default._schema.arguments]
    return names == ["X", "W", "B", "attr", "scalars", "algorithm"]


def _is_matrix(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    return type(module) in (nn.Linear, Conv1D)  # what a subclass makes of its weight is its own affair


def _forward(matrix: nn.Linear | Conv1D, own: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """What the matrix's own `forward` gives."""
    weight, bias = matrix.weight, matrix.bias
    if not (_is_plain(weight) and (bias is None or _is_plain(bias)) and _is_plain(states) and states.numel()):
        return own(states)
    if torch.is_autocast_enabled("cpu") or _is_transformed():
        return own(states)
    return product(states, weight.T if isinstance(matrix, Conv1D) else weight, bias)


def _is_transformed() -> bool:
    """Whether torch.func or forward derivatives look on: oneDNN's operator gives them tangents of 0."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_plain(tensor: Tensor) -> bool:
    """Whether oneDNN can have the tensor: float32 on a CPU, no subclass, and not a weight that is trained."""
    kind = type(tensor)
    return (
        (kind is Tensor or (kind is nn.Parameter and not (tensor.requires_grad and torch.is_grad_enabled())))
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
    )


@torch.no_grad()
def align_weights(model: nn.Module) -> None:
    """Moves float32 weights on a CPU to where a vector register can be filled from one line of the cache. Those read
    from a file lie where the file has them, and products with them then take up to half as long again. A model of
    more than 4 GiB stays where it is."""
    crooked = [each for each in model.parameters() if _is_plain(each) and each.data_ptr() % _CACHE_LINE]
    if sum(parameter.nbytes for parameter in crooked) <= _MOST_MOVED:
        for parameter in crooked:
            parameter.data = parameter.data.clone()
