"""NAS (Liu et al. 2026, arXiv 2602.02543): wanted values of one length, so that norms do not grow edit by edit."""

from __future__ import annotations

import torch
from torch import Tensor

from reknow.editing.values import Values
from reknow.model.exact import exact

__all__ = ["anchor_states"]

_KEPT_NORMS = 0.95
"""The reference norm of NAS is the mean of ‖v*‖ over the edits without the largest twentieth."""


def anchor_states(found: Values, anchor: Tensor | None) -> tuple[Tensor, Tensor]:
    """(z with ‖v*‖ as NAS has it, the reference norm). (facts, hidden), (1,)

    Args:
        anchor: the reference norm; None: that of these values. (1,)
    """
    value, wanted = exact(found.value), exact(found.value) + exact(found.delta)  # v, v*: (facts, hidden)
    norms = wanted.norm(dim=1)
    if anchor is None:
        anchor = norms.sort().values[: max(1, round(_KEPT_NORMS * len(norms)))].mean(0, keepdim=True)
    anchor = anchor.to(norms)
    scaled = torch.where(norms[:, None] > 2 * anchor, value, wanted * (anchor / norms)[:, None])
    return exact(found.start) - value + scaled, anchor
