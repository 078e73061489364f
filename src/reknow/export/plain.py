"""The model as plain transformers know it: without adapters of `peft`, in the dtype of its checkpoint.

Copies share every tensor with the model but for those that change, so that a copy costs what changes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reknow.errors import PatchError
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.exclusive import undo_on_exit
from reknow.model.loading import carries_adapters
from reknow.model.parts import reorient, stored_weight
from reknow.patching.deltas import add_deltas
from reknow.patching.weights import takes_changes


def find_adapters(model: nn.Module) -> list[str]:
    """Names of the modules that `peft` has put around others; no checkpoint of the model itself holds them."""
    if "peft" not in sys.modules:  # nothing can have been made with it
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def merge_adapters(lm: LM) -> PreTrainedModel:
    """A copy that computes the same with plain modules: what the active adapters and the patches add to a matrix is
    added to its weight.

    Raises:
        PatchError: the base is quantised, or the adapters are of a kind that cannot be added to weights.
    """
    plain: Any = _copy_modules(lm.model)
    while names := find_adapters(plain):  # what is within an adapter may have one too
        parent, _, leaf = names[0].rpartition(".")
        module = _merge_module(plain.get_submodule(names[0]), names[0])
        if names[0] in lm.unmerged:
            weight: Any = module.weight
            weight.data = reorient(module, _summed(lm, names[0], reorient(module, weight))).to(weight.dtype)
        setattr(plain.get_submodule(parent), leaf, module)
    if carries_adapters(plain):
        raise _unmergeable("some of them are no part of a matrix")
    if getattr(plain, "_hf_peft_config_loaded", False):  # by transformers, which left its names
        plain._hf_peft_config_loaded, plain._weight_conversions = False, None
    vars(plain).pop("peft_config", None)
    _settle_ties(plain)
    return plain


def _merge_module(module: Any, name: str) -> nn.Module:
    """The module within `peft`'s, with what the active adapters make of its weights."""
    for inner in module.modules():  # the copy's own from here on, and tied to nothing
        for key, parameter in inner._parameters.items():
            if parameter is not None:
                inner._parameters[key] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    active = not module.disable_adapters
    try:
        if hasattr(module, "unload_and_optionally_merge_module"):
            return module.unload_and_optionally_merge_module(merge=active, safe_merge=True, adapter_names=None)
        if not takes_changes(module.get_base_layer()):
            raise _unmergeable(f"{name} is quantised or offloaded")
        if active and not module.merged:
            module.merge(safe_merge=True)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise _unmergeable(f"{name} says: {error}") from error
    return module.base_layer


def _unmergeable(why: str) -> PatchError:
    return PatchError(
        f"expected adapters that can be added to the weights; {why}: export without them, from the base model with "
        "the patches"
    )


def _settle_ties(model: PreTrainedModel) -> None:
    """Ties embedding and head where they are equal, and says in the configuration where they are not any more."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for config in (model.config, model.config.get_text_config(decoder=True)):
        if not getattr(config, "tie_word_embeddings", False) or head is None or head.weight is embedding.weight:
            continue
        if torch.equal(head.weight, embedding.weight):  # type: ignore[arg-type]
            head.weight = embedding.weight
        else:
            config.tie_word_embeddings = False


def narrow_weights(lm: LM, model: PreTrainedModel) -> tuple[dict[nn.Parameter, Tensor], float]:
    """What to write, in the checkpoint's dtype, of weights that were widened when the checkpoint was opened, and what
    that costs: the largest share of the norm of a base's matrix that is rounded away of its sum with the changes.

    These are all whose base that dtype holds exactly. Where patches change one, it is summed in float64 and cast
    once; where adapters were added to it, the sum is cast. `model` is the LM's own or its copy without adapters.

    Raises:
        PatchError: a sum overflows the dtype.
    """
    dtype = getattr(torch, str(lm.model.config.dtype).removeprefix("torch."), lm.dtype)
    if not dtype.is_floating_point or torch.finfo(dtype).bits >= torch.finfo(lm.dtype).bits:
        return {}, 0.0
    edited = {stored_weight(lm.model.get_submodule(name)): name for patch in lm.patches for name in patch.deltas}
    own = set(lm.model.parameters())
    casts: dict[nn.Parameter, Tensor] = {}
    lost = 0.0
    for parameter in model.parameters():
        if name := edited.get(parameter):
            base = lm.base_weight(name)
            if torch.equal(base.to(dtype).to(base.dtype), base):
                module, summed = lm.model.get_submodule(name), _summed(lm, name, base)
                rounded = summed.to(dtype)
                lost = max(lost, float((rounded - summed).norm() / exact(base).norm()))
                casts[parameter] = reorient(module, rounded)
        else:
            narrow = parameter.detach().to(dtype)
            if parameter not in own or torch.equal(narrow.to(parameter.dtype), parameter):
                casts[parameter] = narrow
    if not all(bool(narrow.isfinite().all()) for narrow in casts.values()):
        raise PatchError(
            f"expected sums that {dtype}, the checkpoint's dtype, can hold; one overflows: open the "
            "model in another dtype (`--dtype float32`), which the export keeps"
        )
    return casts, lost


def _summed(lm: LM, name: str, base: Tensor) -> Tensor:
    """base + Σ ΔW of the applied patches, in float64. (out, in)"""
    return add_deltas(exact(base), [patch.deltas[name] for patch in lm.patches if name in patch.deltas])


@contextmanager
def rounded_weights(casts: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """While open, the weights have the values of their casts, in the dtype they have in memory."""
    kept = {parameter: parameter.data for parameter in casts}

    def back() -> None:
        for parameter, own in kept.items():
            parameter.data = own

    with undo_on_exit(back):
        for parameter, narrow in casts.items():
            parameter.data = narrow.to(parameter.dtype)
        yield


def replace_weights(model: PreTrainedModel, casts: dict[nn.Parameter, Tensor]) -> PreTrainedModel:
    """A copy whose weights are the casts."""
    narrow = {parameter: nn.Parameter(value, requires_grad=False) for parameter, value in casts.items()}
    plain = _copy_modules(model)
    for module in plain.modules():
        for key, parameter in module._parameters.items():
            if parameter in narrow:
                module._parameters[key] = narrow[parameter]
    return plain


def _copy_modules(model: Any) -> Any:
    """A copy of all modules, with the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
