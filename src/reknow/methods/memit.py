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
from typing import TYPE_CHECKING, Annotated

from reknow.checks.bounds import Formerly, Weight
from reknow.contract import check_edits, make_patch
from reknow.editing.keys import Subjects
from reknow.editing.layers import resolve_layers
from reknow.editing.search import SearchSettings
from reknow.editing.solvers import Whitening, cholesky, least_squares
from reknow.editing.values import Site, Values, find_values
from reknow.edits import Edit
from reknow.model.exact import exact
from reknow.patching.deltas import Delta, as_delta
from reknow.patching.patches import Patch

if TYPE_CHECKING:
    from reknow.lm import LM


@dataclass(frozen=True, kw_only=True)
class Band(SearchSettings):
    """Settings of a method that spreads what is missing over a band of layers: MEMIT, PMET. No method by itself."""

    layers: tuple[int, ...] | None = None
    """Layers whose value matrices are changed; None: a sixth of the model, five at most, around `suggest_layer`."""
    regularization: Annotated[Weight, Formerly("stiffness")] = 0.1
    """λ in units of the keys' mean kᵀC⁻¹k: by itself a fact gets 1 / (1 + this) of its change in a layer."""
    covariance_weight: Weight | None = None
    """λ itself, instead of the regularization: MEMIT 15,000 (GPT-J), 20,000 (GPT-2 XL); PMET 6,000 (GPT-J)."""

    def spread(
        self, lm: LM, edits: Sequence[Edit], layers: Sequence[int], found: Values, site: Site, power: float
    ) -> Patch:
        """From layer to layer what is missing of z at `site` of the last one, over layers left to the `power`."""
        z, subjects = exact(found.z), Subjects(lm, edits, self.contexts(lm))  # (facts, hidden)
        deltas: dict[str, Delta] = {}
        with lm.patched():
            for i, layer in enumerate(layers):
                keys = subjects.keys(layer)  # (facts, in)
                missing = z - subjects.states(layers[-1], site)  # (facts, hidden)
                right = least_squares(
                    Whitening(self.from_covariance(lm, layer, cholesky)),
                    keys,
                    regularization=self.regularization,
                    weight=self.covariance_weight,
                    names=[edit.text for edit in edits],
                )  # (facts, in)
                change = {lm.parts.value[layer]: as_delta(missing / (len(layers) - i) ** power, right)}
                lm.apply(make_patch(self, lm, edits, change))
                deltas |= change
        return make_patch(self, lm, edits, deltas, notes={"layers": list(layers), "losses": found.losses})


@dataclass(frozen=True, kw_only=True)
class MEMIT(Band):
    """Mass editing over a band of layers."""

    merge_subjects: bool = False
    """MEMIT-Merge: one δ for all edits of a subject."""

    @property
    def name(self) -> str:
        return "memit-merge" if self.merge_subjects else "memit"

    def one_value_per_key(self) -> bool:
        return not self.merge_subjects

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits)
        layers = resolve_layers(lm, self.layers)
        found = find_values(lm, edits, layers[-1], self.contexts(lm), self.search(site="block"))
        return self.spread(lm, edits, layers, found, "block", 1.0)
