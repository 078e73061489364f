"""EMMET: A Unified Framework for Model Editing. Gupta, Sajnani, Anumanchipalli 2024, arXiv 2403.14236.

ROME's equality constraint for many facts at once: of all changes of one value matrix that give every key its
wanted value, the one that disturbs the keys of general text, whose covariance is C, the least. A small ridge keeps
the system of many alike keys solvable.

    R = z − h,   ΔW = R (Kᵀ C⁻¹ K + ridge · I)⁻¹ Kᵀ C⁻¹,   C scaled by s before                              (eq. 9)

Since R Kᵀ(λC + K Kᵀ)⁻¹ = R (Kᵀ C⁻¹ K + λI)⁻¹ Kᵀ C⁻¹, this is MEMIT in one layer with λ = ridge · s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from reknow.checks.bounds import Formerly, NonNegative
from reknow.contract import check_edits, make_patch
from reknow.editing.layers import resolve_layer
from reknow.editing.search import ValueSearchMethod
from reknow.editing.solvers import least_squares
from reknow.editing.values import Values, find_values
from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.patching.deltas import as_delta
from reknow.patching.patches import Patch


@dataclass(frozen=True, kw_only=True)
class EMMET(ValueSearchMethod):
    """Equality-constrained mass editing of one layer."""

    edits_per_call: ClassVar[int] = 16

    layer: int | None = None
    """Layer whose value matrix is changed; None: `suggest_layer`."""
    regularization: Annotated[NonNegative, Formerly("stiffness")] = 0.01
    """Ridge in units of the keys' mean kᵀC⁻¹k; a single fact has none. Not read where `ridge` is given."""
    ridge: NonNegative | None = None
    """Ridge as a plain number, in place of `regularization`: 0.1 in the authors' code."""
    covariance_scale: NonNegative = 1.0
    """Number s by which C is multiplied first; matters with `ridge` only: 1,000 (GPT-2 XL), 1 (GPT-J, Llama 2)."""

    @property
    def name(self) -> str:
        return "emmet"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits, lm)
        layer = resolve_layer(lm, self.layer)
        return self._write(lm, edits, layer, find_values(lm, edits, layer, self.contexts(lm), self))

    def edit_each(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        edits = [check_edits(self, edit, lm)[0] for edit in edits]
        layer = resolve_layer(lm, self.layer)
        found = find_values(lm, edits, layer, self.contexts(lm), self)
        return [self._write(lm, [edit], layer, found.of(i)) for i, edit in enumerate(edits)]

    def _write(self, lm: LM, edits: Sequence[Edit], layer: int, found: Values) -> Patch:
        """The patch that gives the subjects' keys their wanted values."""
        ridge = None if self.ridge is None else self.ridge * self.covariance_scale
        right = least_squares(
            self.whitening(lm, layer),
            self.subjects(lm, edits).keys(layer),
            regularization=self.regularization,
            weight=0.0 if len(edits) == 1 else ridge,
            names=[edit.text for edit in edits],
        )  # (facts, in)
        # δ is R: the wanted state less the present one, which nothing has moved since.
        deltas = {lm.parts.value[layer]: as_delta(exact(found.delta), right)}
        return make_patch(self, lm, edits, deltas, notes={"layers": [layer], "losses": found.losses})
