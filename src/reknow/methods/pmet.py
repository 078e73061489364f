"""PMET: Precise Model Editing in a Transformer. Li, Li, Song, Yang, Ma, Yu 2023, arXiv 2308.08742.

What attention adds at the subject's last token is general and need not be edited, but it has its part in the wanted
state. So two additions are searched together, one at the output of attention and one at the output of the MLP, and
only the second is written into the value matrices. The search eases off once the answer is the likeliest.

    R = (v* − v) / √(L − l + 1),   ΔW = R Kᵀ (λC + K Kᵀ)⁻¹                                              (eq. 13, 14)

v is the output of the value matrix of layer L, the last of the band.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reknow.edits import Edit
from reknow.keys import subject_keys, subject_states
from reknow.layers import resolve_layers
from reknow.methods.base import checked, weights_patch
from reknow.methods.search import SearchSettings
from reknow.patches import Delta, Patch
from reknow.solvers import least_squares, outer, whitening
from reknow.values import find_values

if TYPE_CHECKING:
    from reknow.lm import LM


@dataclass(frozen=True, kw_only=True)
class PMET(SearchSettings):
    """Mass editing of the MLP's share in the wanted state."""

    layers: tuple[int, ...] | None = None
    """Layers whose value matrices are changed; None: `suggest_layers`."""
    stiffness: float = 0.03
    """λ in units of the keys' mean kᵀC⁻¹k: by itself a fact gets 1 / (1 + stiffness) of its change in a layer."""
    covariance_weight: float | None = None
    """λ itself, instead of the stiffness: 6,000 (GPT-J)."""
    steps: int = 30
    clamp: float = 0.75
    stop_probability: float = 1.0  # what attention took up is not written: ended early, too little is
    success_weight: float = 0.1
    """Weight of the likelihood while the answer is the likeliest in every context."""
    stop_drift: float = 0.01
    """End a fact's search when that is so and the weighted drift is not above."""

    @property
    def name(self) -> str:
        return "pmet"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = checked(self, edits, subject=True)
        layers = resolve_layers(lm, self.layers)
        prefixes = self.contexts(lm)
        found = find_values(lm, edits, layers[-1], prefixes, self.search(attention=True))
        wanted = found.z.double()  # (facts, hidden)
        deltas: dict[str, Delta] = {}
        with lm.patched():
            for i, layer in enumerate(layers):
                keys = subject_keys(lm, edits, layer, prefixes)  # (facts, in)
                missing = wanted - subject_states(lm, edits, layers[-1], "value")  # (facts, hidden)
                right = least_squares(
                    self.from_covariance(lm, layer, whitening),
                    keys,
                    stiffness=self.stiffness,
                    weight=self.covariance_weight,
                    names=[edit.text for edit in edits],
                )  # (facts, in)
                change = {lm.parts.value[layer]: outer(missing / (len(layers) - i) ** 0.5, right)}
                lm.apply(weights_patch(self, lm, edits, change))
                deltas |= change
        return weights_patch(self, lm, edits, deltas, notes={"layers": list(layers), "losses": found.losses})
