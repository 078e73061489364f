"""Low-rank adapters of `peft` around some matrices of a model, while they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from reknow.errors import MissingExtra
from reknow.lm import LM
from reknow.model.exclusive import undo_on_exit
from reknow.model.hooks import weight_replaced
from reknow.model.parts import multiplies
from reknow.patching.deltas import LowRank
from reknow.patching.peft_folder import describe_base

_NAME = "default"


@contextmanager
def adapters_in_use(lm: LM, names: Sequence[str], *, rank: int, alpha: float, adaptive_steps: int | None):
    """While open, `peft`'s layers stand around the matrices; yields its model.

    Args:
        adaptive_steps: AdaLoRA, whose ranks are shared out during so many steps; None: every rank is the same.

    Raises:
        MissingExtra: `peft` is not installed.
    """
    try:
        from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, LoraModel
    except ImportError as error:
        raise MissingExtra("peft", "lora", "training of adapters") from error
    options: dict[str, Any] = dict(target_modules=list(names), lora_alpha=alpha, lora_dropout=0.0)
    options["fan_in_fan_out"] = describe_base(lm, names)["fan_in_fan_out"]
    originals = {name: lm.model.get_submodule(name) for name in names}
    attributes = set(vars(lm.model))

    def remove() -> None:
        for name, module in originals.items():
            parent, _, leaf = name.rpartition(".")
            setattr(lm.model.get_submodule(parent), leaf, module)
        for name in set(vars(lm.model)) - attributes:
            delattr(lm.model, name)
        lm.model.requires_grad_(False).eval()

    with undo_on_exit(remove):
        if adaptive_steps is None:
            yield LoraModel(lm.model, {_NAME: LoraConfig(r=rank, **options)}, _NAME)
        else:
            # Ranks are free for a fifth of the steps, shared out until two fifths from the end, then fixed.
            config = AdaLoraConfig(
                target_r=rank,
                init_r=rank + rank // 2,
                total_step=adaptive_steps + 1,
                tinit=adaptive_steps // 5,
                tfinal=2 * adaptive_steps // 5,
                deltaT=1,
                **options,
            )
            yield AdaLoraModel(lm.model, {_NAME: config}, _NAME)


@torch.no_grad()
def read_factors(layer: Any) -> LowRank:
    """The change that one of `peft`'s layers makes. (out, in)"""
    scale, left, right = layer.scaling[_NAME], layer.lora_B[_NAME], layer.lora_A[_NAME]
    if not hasattr(layer, "lora_E"):
        return LowRank((scale * left.weight).float(), right.weight.float().clone())
    values = layer.lora_E[_NAME]  # (rank, 1)
    kept = values[:, 0] != 0
    scale = scale / (float(layer.ranknum[_NAME]) + 1e-5)  # as in peft's forward pass
    return LowRank((scale * left[:, kept]).float(), (values * right)[kept].float())


@contextmanager
def four_bit_weights(lm: LM):
    """While open, every matrix of the blocks multiplies by its weight as NF4 would store it.

    Raises:
        MissingExtra: `bitsandbytes` is not installed.
    """
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtra("bitsandbytes", "qlora", "the method qlora") from error

    def rounded(weight: Tensor) -> Tensor:
        return dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type="nf4"))

    with ExitStack() as stack:
        for block in lm.parts.blocks:
            for name, module in lm.model.get_submodule(block).named_modules():
                if multiplies(module):
                    stack.enter_context(weight_replaced(module, rounded(lm.weight(f"{block}.{name}"))))
        yield
