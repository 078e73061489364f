"""PMET: Precise Model Editing in a Transformer. Li, Li, Song, Yang, Ma, Yu 2023, arXiv 2308.08742.

What attention adds at the subject's last token is general and need not be edited, but it has its part in the wanted
state. So two additions are searched at once, one at the output of attention and one at the output of the MLP, and
only the second is written into the value matrices. The search eases off once the answer is the most likely.

    R = (v* − v) / √(L − l + 1),   ΔW = R Kᵀ (λC + K Kᵀ)⁻¹                                              (eq. 13, 14)

v is the output of the value matrix of layer L, the last of the band, or with `units="relative"` that layer's output,
to which the same is added: what is missing is measured where the additions of all layers arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from reknow.checks.bounds import Formerly, NonNegative, Number, Rate, Share
from reknow.contract import check_edits
from reknow.editing.band import BandMethod
from reknow.editing.layers import resolve_layers
from reknow.editing.search import SearchRules
from reknow.edits import Edit
from reknow.lm import LM
from reknow.patching.patches import Patch


@dataclass(frozen=True, kw_only=True)
class PMET(BandMethod):
    """Mass editing of the MLP's share in the wanted state."""

    distance_power: ClassVar[float] = 0.5

    regularization: Annotated[NonNegative, Formerly("stiffness")] = 0.03
    steps: Number = 30
    clamp: Rate = 0.75
    stop_probability: Share = 1.0  # what attention took up is not written: ended early, too little is
    min_delta: Annotated[NonNegative, Formerly("stop_gain")] = 0.0
    success_weight: NonNegative = 0.1
    """Weight of the likelihood while the new answer is the most likely in every context."""
    stop_drift: NonNegative = 0.01
    """Weighted drift at which a fact's search ends, once the new answer is the most likely in every context."""

    @property
    def rules(self) -> SearchRules:
        # Additions in the lower layers reach the stream but hardly the last matrix's output: measured there, as in
        # the authors' code, five layers add 3.2 times δ (docs/log.md).
        return SearchRules(
            site="value" if self.units == "absolute" else "block",
            moves_attention=True,
            success_weight=self.success_weight,
            stop_drift=self.stop_drift,
        )

    @property
    def name(self) -> str:
        return "pmet"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits, lm)
        layers = resolve_layers(lm, self.layers)
        found = self.find_states(lm, edits, layers)
        return self.distribute_residual(lm, edits, layers, found)
