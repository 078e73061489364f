"""The matrices of a model as base + Σ ΔW, seen as (out, in).

Where a weight is a plain tensor in memory the changes are added to it, and the base's bits are kept. Where it is not,
because it is quantised, offloaded or adapted, ΔW stays unmerged: its product is computed beside the matrix and added
to the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from reknow.errors import InputError, ModelError, PatchError
from reknow.model.exact import exact
from reknow.model.hooks import forwards_replaced, own_forward, set_forward
from reknow.model.parts import device_of, embedding_matrix, is_matrix, reorient, shape, stored_weight, wraps_matrix
from reknow.patching.deltas import Delta, Dense, LowRank, add_deltas, sum_deltas
from reknow.patching.patches import Patch

_UNSURE: tuple[Delta, ...] = (Dense(torch.empty(0, 0)),)
"""In place of a matrix's changes while it is written: equal to none."""

BLOCK = 64
"""Changes of a matrix whose sum is kept, so that a patch on top of thousands costs no more than on a few."""


class Weights:
    """Reads and changes the matrices of `model` by module name."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._base: dict[str, Tensor] = {}
        """Untouched copies of the changed weights, the way round the model stores them."""
        self._changes: dict[str, tuple[Delta, ...]] = {}
        self._sums: dict[str, tuple[tuple[Delta, ...], Tensor]] = {}
        """The first changes of a matrix, whole blocks of them, and base + their sum in float64."""
        self._unmerged: dict[str, Callable | None] = {}
        """Matrix whose change is unmerged → what stood in place of its `forward` before."""

    @property
    def unmerged(self) -> tuple[str, ...]:
        """Names of the matrices whose change is not added to their weight but computed beside it."""
        return tuple(self._unmerged)

    def current(self, name: str) -> Tensor:
        """The weight as it is, (out, in). Writing to the view writes to the model, unless changes are unmerged."""
        module = self._module(name)
        if takes_changes(module):
            return reorient(module, stored_weight(module))
        base = self.base(name)
        return add_deltas(exact(base), self._changes.get(name, ())).to(base)

    def _module(self, name: str) -> nn.Module:
        """The module of that name; raises InputError where the model has none."""
        try:
            return self._model.get_submodule(name)
        except AttributeError:
            raise InputError(
                f"expected the name of a matrix; the model has no {name!r}: lm.parts.value lists those of facts"
            ) from None

    @torch.no_grad()
    def base(self, name: str) -> Tensor:
        """The weight with no patch applied, (out, in). Read only."""
        module = self._module(name)
        if name in self._base:
            return reorient(module, self._base[name])
        with align_module_device(module):  # brings what is offloaded into memory
            weight = getattr(module, "weight", None)
            if takes_changes(module):
                return reorient(module, stored_weight(module).detach())
            if isinstance(weight, Tensor) and weight.device.type == "meta":
                raise ModelError(
                    f"expected the weight of {name} in memory or offloaded by Accelerate; it is nowhere: load the "
                    "model whole"
                )
        # A quantised or adapted matrix shows its weight when it multiplies the identity.
        states = embedding_matrix(self._model)
        unit = torch.eye(shape(module)[1], dtype=states.dtype, device=device_of(module, states.device))
        with forwards_replaced({module: self._forward(name, module)}):
            return (module(unit) - module(torch.zeros_like(unit[:1]))).T

    @torch.no_grad()
    def set(self, patches: Sequence[Patch]) -> None:
        """Makes every matrix base + Σ ΔW of these patches.

        In a weight they are summed in float64 and cast once. Where it fails or is interrupted some matrices may be
        changed and others not, until the next call is through.

        Raises:
            PatchError: a patch names a matrix that is not there or has another shape, or a sum overflows the dtype.
        """
        wanted: dict[str, list[Delta]] = {}
        shapes: dict[str, tuple[int, int] | None] = {}
        for patch in patches:
            for name, delta in patch.deltas.items():
                if name not in shapes:
                    shapes[name] = self._shape(name)
                if (own := shapes[name]) != delta.shape:
                    got = f"has {own[0]} x {own[1]}" if own else "is not there"
                    raise PatchError(
                        f"expected a matrix {name} of {delta.shape[0]} x {delta.shape[1]} for {patch.label}; "
                        f"in this model it {got}: load the model on which the patch was made"
                    )
                wanted.setdefault(name, []).append(delta)
        # No stage: a listener that ends the work by an error would keep the weights from coming back.
        for name in dict.fromkeys((*self._changes, *wanted)):
            self._write(name, tuple(wanted.get(name, ())))

    def _write(self, name: str, deltas: tuple[Delta, ...]) -> None:
        if deltas == self._changes.get(name, ()):
            return
        module = self._model.get_submodule(name)
        if not takes_changes(module):
            return self._put_unmerged(name, module, deltas)
        weight = self.current(name)
        if name not in self._base:
            self._base[name] = reorient(module, weight).detach().clone()
        base = self.base(name)
        changed = self._sum(name, base, deltas).to(weight.dtype) if deltas else base
        if deltas and not bool(changed.isfinite().all()):
            raise PatchError(f"expected a sum that {weight.dtype} can hold; {name} overflows: use another dtype")
        self._changes[name] = _UNSURE
        weight.copy_(changed)
        if deltas:
            self._changes[name] = deltas
        else:
            del self._base[name], self._changes[name]
            self._sums.pop(name, None)

    def _sum(self, name: str, base: Tensor, deltas: tuple[Delta, ...]) -> Tensor:
        """base + Σ ΔW in float64. Its bits depend on the changes and their order alone, not on what was kept."""
        known, value = self._sums.get(name, ((), base))
        if deltas[: len(known)] != known:
            known, value = (), base
        value = exact(value)
        for start in range(len(known), len(deltas) - BLOCK + 1, BLOCK):
            known = deltas[: start + BLOCK]
            value = add_deltas(value, known[start:])
            self._sums[name] = known, value
        return add_deltas(value, deltas[len(known) :])

    def _put_unmerged(self, name: str, module: nn.Module, deltas: tuple[Delta, ...]) -> None:
        changed = with_unmerged(self._forward(name, module), sum_deltas(deltas)) if deltas else None
        own = self._unmerged.setdefault(name, own_forward(module))
        self._changes[name] = _UNSURE
        set_forward(module, changed or own)
        if deltas:
            self._changes[name] = deltas
        else:
            del self._unmerged[name], self._changes[name]

    def _forward(self, name: str, module: nn.Module) -> Callable:
        """What the matrix computes without its unmerged change."""
        own = self._unmerged.get(name, own_forward(module))
        return partial(type(module).forward, module) if own is None else own

    def _shape(self, name: str) -> tuple[int, int] | None:
        """(out, in) of the matrix; None: it is not there."""
        try:
            module = self._model.get_submodule(name)
        except AttributeError:
            return None
        return shape(module) if is_matrix(module) else None


def takes_changes(module: nn.Module) -> bool:
    """Whether a change can be added to the matrix's weight: a plain tensor of floating-point numbers in memory, and
    all that the matrix multiplies by."""
    weight: Any = getattr(module, "weight", None)
    if wraps_matrix(module) or type(weight) not in (nn.Parameter, Tensor) or type(weight.data) is not Tensor:
        return False
    return weight.is_floating_point() and weight.device.type != "meta" and weight.dim() == 2


def with_unmerged(forward: Callable, change: Delta) -> Callable:
    """`forward` of a matrix, with the product of its input and `change` in float32 added to its output."""
    factors = [change.right, change.left] if isinstance(change, LowRank) else [change.matrix]

    def changed(states: Tensor) -> Tensor:
        nonlocal factors
        output = forward(states)
        if factors[0].device != output.device:
            factors = [factor.to(output.device) for factor in factors]
        added = states.to(output.device).float()
        for factor in factors:
            added = nn.functional.linear(added, factor.float())
        return output + added.to(output.dtype)

    return changed
