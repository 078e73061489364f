"""MEMIT: Mass-Editing Memory in a Transformer. Meng, Sen Sharma, Andonian, Belinkov, Bau 2022, arXiv 2210.07229.

Many facts are written at once, each spread over a band of layers. For every fact gradient descent finds the state z
that the subject's last token should have behind the last layer of the band. Then, from the first layer to the last,
what is still missing is divided by the number of layers left, and the value matrix is changed by the least-squares
solution that also spares the keys of general text, whose covariance is C:

    R = (z − h) / (L − l + 1),   ΔW = R Kᵀ (λC + K Kᵀ)⁻¹                                              (eq. 14, 20)

MEMIT-Merge (Dong, Shen, Xia 2025, arXiv 2502.07322): edits of one subject have one key, so they share one δ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reknow.contract import check_edits
from reknow.editing.band import BandMethod
from reknow.editing.layers import resolve_layers
from reknow.editing.search import SearchRules
from reknow.edits import Edit
from reknow.lm import LM
from reknow.patching.patches import Patch


@dataclass(frozen=True, kw_only=True)
class MEMIT(BandMethod):
    """Mass editing over a band of layers."""

    merge_subjects: bool = False
    """Search one δ for all edits of a subject, as MEMIT-Merge does."""
    forward_targets: bool = False
    """Search z behind the first layer and carry it forward, so that every layer has a target of its own, as MEMIT-FE
    does."""

    @property
    def rules(self) -> SearchRules:
        return SearchRules(merge_subjects=self.merge_subjects, forward_targets=self.forward_targets)

    @property
    def name(self) -> str:
        return "memit-fe" if self.forward_targets else "memit-merge" if self.merge_subjects else "memit"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits, lm)
        layers = resolve_layers(lm, self.layers)
        found = self.find_states(lm, edits, layers)
        return self.distribute_residual(lm, edits, layers, found)
