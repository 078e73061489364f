"""Numbers that must be right: sums and solutions in float64, losses that are finite.

Apple's mps has no float64: what lies there is computed on the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reknow.errors import EditFailed

_WITHOUT = ("mps",)
"""Kinds of devices without float64."""


def exact_device(device: torch.device) -> torch.device:
    """Where float64 is computed for what lies on `device`: there, or on the CPU where it has none."""
    return torch.device("cpu") if device.type in _WITHOUT else device


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its own device if that has it, else on the CPU."""
    return tensor.to(exact_device(tensor.device), torch.float64)


def finite_loss(value: Tensor) -> float:
    """A loss, or a sum that is checked, as a number; raises EditFailed where it is none."""
    number = float(value.detach())
    if not math.isfinite(number):
        raise EditFailed("expected finite losses and logits; got NaN or infinity: lower learning_rate")
    return number
