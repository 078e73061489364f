"""Which of the two matrices that read the stream into an MLP is the gate: found by what it does, not by its name."""

from __future__ import annotations

from functools import partial

import torch

from reknow.errors import InputError
from reknow.model.decoder import Decoder
from reknow.model.hooks import hooked
from reknow.model.parts import device_of


@torch.no_grad()
def gate_and_up(lm: Decoder, layer: int) -> tuple[str, str]:
    """Names of the gate and of the up matrix of a layer: value input = act(gate(x)) ⊙ up(x).

    With its output's sign turned, up turns the sign of what the value matrix gets; a gate does not.

    Raises:
        InputError: the MLP has no gate, one that is fused with up, or another form.
        ModelError: the layer is a mixture of experts.
    """
    names = lm.mlp_in(layer)
    plain = _value_input(lm, layer, None) if len(names) == 2 else None
    up = [] if plain is None else [n for n in names if torch.allclose(_value_input(lm, layer, n), -plain)]
    if plain is None or len(up) != 1 or not bool(plain.any()):
        raise InputError(
            f"expected an MLP with a gate and an up matrix in layer {layer} of {lm.name}; got {', '.join(names)}: "
            "leave gate_layers out"
        )
    return next(name for name in names if name not in up), up[0]


def _value_input(lm: Decoder, layer: int, turned: str | None) -> torch.Tensor:
    """What the value matrix gets for some states, the output of the matrix `turned` negated."""
    value = lm.model.get_submodule(lm.parts.value[layer])
    mlp = lm.model.get_submodule(lm.parts.value[layer].rpartition(".")[0])
    states = torch.randn(4, lm.parts.hidden_size, generator=torch.Generator().manual_seed(0))
    found: list[torch.Tensor] = []
    hooks = [partial(value.register_forward_pre_hook, lambda _module, args: found.append(args[0].float()))]
    if turned is not None:
        module = lm.model.get_submodule(turned)
        hooks.append(partial(module.register_forward_hook, lambda _module, _args, output: -output))
    with hooked(*hooks):
        mlp(states[None].to(device_of(mlp, lm.device), lm.dtype))
    return found[0]
