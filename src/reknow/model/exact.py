"""Sums and solutions in float64. Apple's mps has none: what lies there is computed on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT = ("mps",)
"""Kinds of devices without float64."""


def exact_device(device: torch.device) -> torch.device:
    """Where float64 is computed for what lies on `device`: there, or on the CPU where it has none."""
    return torch.device("cpu") if device.type in WITHOUT else device


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its own device if that has it, else on the CPU."""
    return tensor.to(exact_device(tensor.device), torch.float64)
