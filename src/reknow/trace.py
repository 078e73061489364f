"""Reading and replacing what modules compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation

if TYPE_CHECKING:
    from reknow.lm import LM


class Stop(Exception):
    """Ends a forward pass once everything wanted was seen."""


def first(output) -> Tensor:
    """The hidden states of a module's output, which may be a tuple or a list."""
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def output_edited(module: nn.Module, edit: Callable[[Tensor], Tensor]):
    """While open, the module's output is `edit(output)`, in the shape in which the module gives it."""

    def hook(_module, _args, output):
        if isinstance(output, (tuple, list)):
            return type(output)([edit(output[0]), *output[1:]])
        return edit(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recorded(model: nn.Module, inputs: Iterable[str] = (), outputs: Iterable[str] = (), *, stop: bool = False):
    """Yields two dicts, name → (rows, columns, features), filled while the model runs.

    With `stop` the pass ends as soon as all were seen; the caller's model call then returns nothing, so it must
    be the last statement of the block.
    """
    seen_in: dict[str, Tensor] = {}
    seen_out: dict[str, Tensor] = {}
    inputs, outputs = list(inputs), list(outputs)

    def check():
        if stop and len(seen_in) == len(inputs) and len(seen_out) == len(outputs):
            raise Stop

    def before(name):
        def hook(_module, args, kwargs):
            seen_in[name] = args[0] if args else next(iter(kwargs.values()))
            check()

        return hook

    def after(name):
        def hook(_module, _args, output):
            seen_out[name] = first(output).clone()  # Falcon goes on to add to it in place
            check()

        return hook

    with ExitStack() as stack:
        for name in inputs:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(before(name), with_kwargs=True).remove)
        for name in outputs:
            stack.callback(model.get_submodule(name).register_forward_hook(after(name)).remove)
        with suppress(Stop):
            yield seen_in, seen_out


@contextmanager
def swapped(module: nn.Module, forward: Callable):
    """While open, calling the module calls `forward`."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def fused_gelu(model: nn.Module):
    """While open, GELU by tanh is torch's, one pass over memory each way; transformers' takes eight, a fifth of the
    time of a small model's block. The same function up to rounding."""
    fused = partial(nn.functional.gelu, approximate="tanh")
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (NewGELUActivation, FastGELUActivation)):
                stack.enter_context(swapped(module, fused))
        yield


def mlp_only_at(lm: LM, rows: Tensor, columns: Tensor):
    """While open, the last block's MLP is computed at these places alone, where it is a module that maps states to
    states; elsewhere it gives 0. What the block gives at other places is read by nobody."""
    block, name = lm.parts.blocks[-1], lm.parts.value[-1].rpartition(".")[0]
    module = lm.model.get_submodule(name)
    own = module.forward

    def forward(states: Tensor, *rest):
        wanted = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        wanted[rows, columns] = True  # a place may be asked for twice
        found = own(states[wanted], *(a[wanted] if isinstance(a, Tensor) else a for a in rest))
        return states.new_zeros(*states.shape[:2], found.shape[-1]).index_put((wanted,), found)

    # A memory wants to see whole rows.
    return nullcontext() if name == block or lm.hooked else swapped(module, forward)


def weight_replaced(module: nn.Module, weight: Tensor):
    """While open, the matrix `module` multiplies by `weight` (out, in), in that tensor's dtype; its own stays."""
    own, bias = module.forward, None

    def forward(states: Tensor) -> Tensor:
        nonlocal bias
        if bias is None:  # what it gives for 0, wherever a quantised, offloaded or adapted one keeps that
            with torch.no_grad():
                bias = own(states.new_zeros(1, states.shape[-1]))[0].to(weight.dtype)
        return nn.functional.linear(states.to(weight.dtype), weight, bias).to(states.dtype)

    return swapped(module, forward)


def by_row(states: Tensor, rows: int) -> Tensor:
    """States as (rows, columns, features), also of a module that flattens rows and columns (OPT)."""
    return states.reshape(rows, -1, states.shape[-1])


def added_at(delta: Tensor, column: int) -> Callable[[Tensor], Tensor]:
    """A function that adds `delta` to states and keeps their shape: (rows, features) in one column, (rows, columns,
    features) from that column on."""
    wide = delta if delta.dim() == 3 else delta[:, None]

    def add(states: Tensor) -> Tensor:
        rows = by_row(states, len(wide))
        end = column + wide.shape[1]
        return torch.cat([rows[:, :column], rows[:, column:end] + wide, rows[:, end:]], dim=1).reshape(states.shape)

    return add
