"""Reading and replacing what modules compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reknow.model.exclusive import undo_on_exit


class Stop(Exception):
    """Ends a forward pass once everything wanted was seen."""


def hidden_states(output) -> Tensor:
    """The hidden states of a module's output, which may be a tuple or a list."""
    return output[0] if isinstance(output, (tuple, list)) else output


@contextmanager
def hooked(*hooks: Callable[[], RemovableHandle]):
    """While open, these hooks are on; each is given as what puts it on."""
    handles: list[RemovableHandle] = []
    with undo_on_exit(lambda: [handle.remove() for handle in handles]):
        for put_on in hooks:
            handles.append(put_on())
        yield


def output_edited(module: nn.Module, edit: Callable[[Tensor], Tensor]):
    """While open, the module's output is `edit(output)`, in the shape in which the module gives it."""

    def hook(_module, _args, output):
        if isinstance(output, (tuple, list)):
            return type(output)([edit(output[0]), *output[1:]])
        return edit(output)

    return hooked(partial(module.register_forward_hook, hook))


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
            seen_out[name] = hidden_states(output).clone()  # Falcon goes on to add to it in place
            check()

        return hook

    modules = {name: model.get_submodule(name) for name in (*inputs, *outputs)}
    pre = (partial(modules[n].register_forward_pre_hook, before(n), with_kwargs=True) for n in inputs)
    post = (partial(modules[n].register_forward_hook, after(n)) for n in outputs)
    with hooked(*pre, *post), suppress(Stop):
        yield seen_in, seen_out


def forward_replaced(module: nn.Module, forward: Callable):
    """While open, calling the module calls `forward`."""
    return forwards_replaced({module: forward})


@contextmanager
def forwards_replaced(forwards: Mapping[nn.Module, Callable]):
    """While open, calling each of the modules calls its function."""
    own = {module: own_forward(module) for module in forwards}

    def back() -> None:
        for module, forward in own.items():
            set_forward(module, forward)

    with undo_on_exit(back):
        for module, forward in forwards.items():
            set_forward(module, forward)
        yield


def own_forward(module: nn.Module) -> Callable | None:
    """What stands in place of the `forward` of the module's class; None: nothing does."""
    return module.__dict__.get("forward")


def set_forward(module: nn.Module, forward: Callable | None) -> None:
    """Puts a function in place of the `forward` of the module's class; None: nothing. At once, or not at all."""
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def weight_replaced(module: nn.Module, weight: Tensor):
    """While open, the matrix `module` multiplies by `weight` (out, in), in that tensor's dtype; its own stays."""
    own, bias = module.forward, None

    def forward(states: Tensor) -> Tensor:
        nonlocal bias
        if bias is None:  # what it gives for 0, wherever a quantised, offloaded or adapted one keeps that
            with torch.no_grad():
                bias = own(states.new_zeros(1, states.shape[-1]))[0].to(weight.dtype)
        return nn.functional.linear(states.to(weight.dtype), weight, bias).to(states.dtype)

    return forward_replaced(module, forward)


def by_row(states: Tensor, rows: int) -> Tensor:
    """States as (rows, columns, features), also of a module that flattens rows and columns (OPT)."""
    return states.reshape(rows, -1, states.shape[-1])


def added_at(delta: Tensor, column: int) -> Callable[[Tensor], Tensor]:
    """A function that adds `delta` to states and keeps their shape: (rows, features) in one column, (rows, columns,
    features) from that column on."""
    wide = delta if delta.dim() == 3 else delta[:, None]

    def add(states: Tensor) -> Tensor:
        rows, here = by_row(states, len(wide)), wide.to(states.device)
        end = column + wide.shape[1]
        return torch.cat([rows[:, :column], rows[:, column:end] + here, rows[:, end:]], dim=1).reshape(states.shape)

    return add
