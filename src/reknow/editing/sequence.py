"""Edits that are made one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reknow.edits import Edit
from reknow.lm import LM
from reknow.patching.patches import Patch, merge


def edit_sequentially(lm: LM, edits: Sequence[Edit], edit_one: Callable[[Edit], Patch]) -> Patch:
    """One patch of edits made one after the other, each on the model as those before it left it."""
    patches: list[Patch] = []
    with lm.restored_afterwards():
        for edit in lm.progress.each("edits", edits):
            patches.append(edit_one(edit))
            lm.apply(patches[-1])
    return patches[0] if len(patches) == 1 else merge(patches)
