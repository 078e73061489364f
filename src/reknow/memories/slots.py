"""CaliNet's slots: more keys and values beside an MLP, FFN′(H) = FFN(H) + act(H K̃ᵀ) Ṽ. (Dong et al. 2022,
arXiv 2210.03329, eq. 5)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from reknow.errors import PatchError
from reknow.lm import LM
from reknow.model.forward_context import ForwardContext
from reknow.patching.memory import Hooks, OutputChange
from reknow.patching.patches import Patch
from reknow.patching.state_spec import check_matrix

__all__ = ["Slots", "merge", "slot_hooks"]


@dataclass(eq=False)
class Slots:
    """Keys and values beside one MLP."""

    mlp_in: str
    """Module whose input is the MLP's."""
    mlp_out: str
    """Module whose output is the MLP's."""
    activation: str
    """Name of the MLP's activation in transformers."""
    keys: Tensor  # (slots, hidden)
    values: Tensor  # (slots, hidden)

    @classmethod
    def beside(cls, lm: LM, layer: int, keys: Tensor, values: Tensor) -> Slots:
        """Slots beside the MLP of that layer."""
        config = lm.model.config.get_text_config(decoder=True)
        names = (getattr(config, name, None) for name in ("hidden_activation", "hidden_act", "activation_function"))
        activation = next((name for name in names if isinstance(name, str) and name in ACT2FN), "gelu")
        return cls(lm.mlp_in(layer)[0], lm.parts.value[layer], activation, keys, values)

    @classmethod
    def read(cls, lm: LM, patch: Patch) -> Slots:
        """The slots of a patch.

        Raises:
            PatchError: they are of another model.
        """
        mlp_out = patch.memory["writer"]
        check_matrix(lm, mlp_out, {"out": (patch.state["values"], 1)})
        keys, values = (patch.state[name].to(lm.device_of(mlp_out)) for name in ("keys", "values"))
        slots = cls.beside(lm, lm.parts.value.index(mlp_out), keys, values)
        if patch.memory != slots.memory or keys.shape[1] != lm.weight(slots.mlp_in).shape[1]:
            raise PatchError(
                f"expected slots that read {slots.mlp_in} through {slots.activation}; got others at "
                f"{patch.memory['reader']!r}: load the model on which they were made"
            )
        return slots

    @property
    def memory(self) -> dict[str, str]:
        """What a patch says of them."""
        return {"reader": self.mlp_in, "writer": self.mlp_out, "activation": self.activation}


def merge(slots: Sequence[Slots]) -> list[Slots]:
    """The same slots, those beside one MLP in one."""
    groups: dict[str, list[Slots]] = {}
    for one in slots:
        groups.setdefault(one.mlp_out, []).append(one)
    return [
        replace(group[0], keys=torch.cat([s.keys for s in group]), values=torch.cat([s.values for s in group]))
        for group in groups.values()
    ]


def slot_hooks(slots: Sequence[Slots]) -> Hooks:
    """The hooks that run the slots."""
    states: dict[str, Tensor] = {}

    def keep(mlp_in: str, _context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
        states[mlp_in] = inputs
        return outputs

    def add(group: Sequence[Slots], _context: ForwardContext, _inputs: Tensor, outputs: Tensor) -> Tensor:
        for one in group:
            hidden = states[one.mlp_in].to(one.keys.dtype)
            outputs = outputs + ACT2FN[one.activation](hidden @ one.keys.T) @ one.values
        return outputs

    changes: dict[str, OutputChange] = {one.mlp_in: partial(keep, one.mlp_in) for one in slots}
    for one in slots:
        changes[one.mlp_out] = partial(add, [each for each in slots if each.mlp_out == one.mlp_out])
    return Hooks(changes)
