"""Mixtures of experts: the value matrices of a layer's experts as the one wide matrix that they are together.

A mixture gives Σ_e g_e W_e k_e, with the router's weight g_e, which is 0 for all experts but a few. That is W k for

    W = [W_1 … W_E]   (hidden, E · inner),      k = [g_1 k_1; …; g_E k_E]   (E · inner,)

So a layer has one value matrix, whose key is zero but for the experts to which the token is routed: what a method
writes for a key lies in those. The matrix stands in the model as a module without parameters of its own, in the
experts' place for the products.

Transformers keeps the experts of a layer in one module, as parameters of three dimensions, and says of it how they
lie (its interface for implementations of experts). Others are left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ExpertsValue", "experts_setting", "has_experts", "join_experts", "restored_on_error"]

_NAME = "value_matrix"
"""The module that is put into the experts' module."""
_TOLD = ("config", "has_gate", "has_bias", "is_transposed", "_apply_gate")
"""What transformers says of the form of fused experts."""
_FORWARD = "reknow"
"""Our way of computing experts, among those of transformers."""


class ExpertsValue(nn.Linear):
    """The value matrices of all experts side by side. Its weight is theirs, seen as (hidden, experts · inner)."""

    def __init__(self, experts: Any):
        nn.Module.__init__(self)  # no parameters
        self.__dict__["experts"] = experts  # which it stands in, and is no part of it
        count, *sizes = experts.down_proj.shape
        self.groups: int = count
        """Among how many experts the inputs are divided."""
        inner, self.out_features = sizes if experts.is_transposed else reversed(sizes)
        self.in_features = count * inner
        self.register_parameter("bias", None)

    @property
    def stored(self) -> nn.Parameter:
        """The experts' parameter: (experts, hidden, inner) or (experts, inner, hidden)."""
        stored = self.__dict__["experts"].down_proj
        # Laid out as (hidden, experts, inner) in memory, so that the matrix is a view, which can be written to.
        if not (self.is_transposed or stored.is_meta or stored.transpose(0, 1).is_contiguous()):
            stored.data = stored.data.transpose(0, 1).contiguous().transpose(0, 1)
        return stored

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A view of the experts' parameter. (hidden, experts · inner)"""
        return self.joined(self.stored)

    @property
    def is_transposed(self) -> bool:
        """Whether the experts' matrices are stored as (inner, hidden)."""
        return self.__dict__["experts"].is_transposed

    def joined(self, stored: Tensor) -> Tensor:
        """The matrix (hidden, experts · inner) of what is stored: a view where it is laid out for that."""
        if self.is_transposed:
            return stored.reshape(self.in_features, self.out_features).T
        return stored.transpose(0, 1).reshape(self.out_features, self.in_features)

    def split(self, weight: Tensor) -> Tensor:
        """A matrix (hidden, experts · inner) as it is stored."""
        if self.is_transposed:
            return weight.T.reshape(self.groups, -1, self.out_features)
        return weight.unflatten(1, (self.groups, -1)).transpose(0, 1)

    def forward(self, keys: Tensor) -> Tensor:
        """W k, with the experts alone that a key reaches. (tokens, experts · inner) → (tokens, hidden)"""
        stored = self.stored
        parts = keys.reshape(-1, self.groups, self.in_features // self.groups)
        experts, tokens = (parts != 0).any(2).T.nonzero(as_tuple=True)  # in the order of the experts
        products = []
        for expert, own in _by_expert(parts[tokens, experts], experts):
            matrix = stored[expert].T if self.is_transposed else stored[expert]
            products.append(nn.functional.linear(own, matrix))
        values = keys.new_zeros(len(parts), self.out_features)
        if products:
            values = values.index_add(0, tokens, torch.cat(products))
        return values.reshape(*keys.shape[:-1], self.out_features)


def _by_expert(rows: Tensor, experts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The number of each expert, and its rows. rows: (n, features), in the order of experts: (n,)"""
    numbers, counts = experts.unique_consecutive(return_counts=True)
    return zip(numbers.tolist(), rows.split(counts.tolist()), strict=True)


def experts_setting(model: nn.Module, config: Any) -> str | None:
    """The setting of a configuration that says that the model has several experts; None where it has none, since a
    dense model may have the field too."""
    counts = {name: count for name, count in vars(config).items() if "experts" in name and "per_tok" not in name}
    names = [name for name, count in counts.items() if isinstance(count, int) and count > 1]
    return names[0] if names and has_experts(model) else None


def has_experts(module: nn.Module) -> bool:
    """Whether names inside the module speak of experts."""
    parameters = (name.lower() for name, _ in module.named_parameters())
    classes = (type(inner).__name__.lower() for inner in module.modules())
    return any("expert" in name or "moe" in name for name in parameters) or any("expert" in name for name in classes)


def join_experts(model: nn.Module) -> list[str]:
    """Gives the experts of every layer their one value matrix, where transformers says how they lie; names of these
    modules. What the model computes and what it is saved as stay the same."""
    found = []
    for name, experts in list(_fused(model)):
        if _NAME not in experts._modules:
            experts.add_module(_NAME, ExpertsValue(experts))
            experts.config = copy.copy(experts.config)  # this one's alone: a copy of the model need not have it
            experts.config._experts_implementation = _FORWARD
        found.append(f"{name}.{_NAME}")
    if found:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # not in all versions from 5.0 on

        ALL_EXPERTS_FUNCTIONS.register(_FORWARD, _experts_forward)
    return found


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Where the body fails, experts that it joined are as they were before, and the model with them."""
    before = [(experts, experts.config) for _, experts in _fused(model) if _NAME not in experts._modules]
    try:
        yield
    except BaseException:
        for experts, config in before:
            experts._modules.pop(_NAME, None)
            experts.config = config
        raise


def _fused(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules of experts whose form transformers tells, and whose output is a sum of products."""
    for name, module in model.named_modules():
        weight = module._parameters.get("down_proj")
        told = all(hasattr(module, part) for part in _TOLD)
        if told and weight is not None and weight.dim() == 3 and not getattr(module, "has_post_expert_norm", False):
            yield name, module


def _experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts' module gives, by way of the keys. (tokens, hidden)"""
    count, inner = len(self.down_proj), self.down_proj.shape[1 if self.is_transposed else 2]
    here = top_k_index < count  # others are elsewhere
    order = top_k_index[here].argsort(stable=True)
    experts = top_k_index[here][order]
    tokens = here.nonzero()[:, 0][order]
    share = top_k_weights[here][order][:, None]  # (n, 1)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    parts = []
    for expert, states in _by_expert(hidden_states[tokens], experts):
        matrix = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        read = nn.functional.linear(states, matrix.T if self.is_transposed else matrix, bias)
        parts.append(self._apply_gate(read) if self.has_gate else self.act_fn(read))
    keys = hidden_states.new_zeros(len(hidden_states), count, inner)
    if parts:
        keys = keys.index_put((tokens, experts), (torch.cat(parts) * share).to(keys.dtype))
    values = self._modules[_NAME](keys.flatten(1))
    if self.has_bias:
        values = values.index_add(0, tokens, (self.down_proj_bias[experts] * share).to(values.dtype))
    return values
