"""Writing what is missing of wanted states over a band of layers (MEMIT, arXiv 2210.07229, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from reknow.checks.bounds import Formerly, NonNegative
from reknow.contract import check_edits, make_patch
from reknow.editing.keys import Subjects
from reknow.editing.layers import resolve_layers
from reknow.editing.search import ValueSearchMethod
from reknow.editing.solvers import least_squares
from reknow.editing.values import Values, find_values
from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.patching.deltas import Delta, as_delta
from reknow.patching.patches import Patch

__all__ = ["BandMethod"]


@dataclass(frozen=True, kw_only=True)
class BandMethod(ValueSearchMethod):
    """A method that writes what is missing over a band of layers: MEMIT, PMET."""

    edits_per_call: ClassVar[int] = 16
    distance_power: ClassVar[float] = 1.0
    """A layer gets what is missing by the number of layers left to this power (PMET: 0.5)."""

    layers: tuple[int, ...] | None = None
    """Layers whose value matrices are changed; None: a sixth of the model, five at most, around `suggest_layer`."""
    regularization: Annotated[NonNegative, Formerly("stiffness")] = 0.1
    """λ in units of the keys' mean kᵀC⁻¹k: by itself a fact gets 1 / (1 + this) of its change in a layer. Not read
    where `covariance_weight` is given."""
    covariance_weight: NonNegative | None = None
    """λ as a number, in place of `regularization`: MEMIT 15,000 (GPT-J), 20,000 (GPT-2 XL); PMET 6,000 (GPT-J)."""

    def edit_each(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        edits = [check_edits(self, edit, lm)[0] for edit in edits]
        layers = resolve_layers(lm, self.layers)
        found = find_values(lm, edits, layers[-1], self.contexts(lm), self, apart=True)
        return [self.distribute_residual(lm, [edit], layers, found.of(i)) for i, edit in enumerate(edits)]

    def distribute_residual(self, lm: LM, edits: Sequence[Edit], layers: Sequence[int], found: Values) -> Patch:
        """The patch that brings the subjects to z behind the last layer, a part of what is missing in each layer."""
        z, subjects = exact(found.z), Subjects(lm, edits, self.contexts(lm))  # (facts, hidden)
        deltas: dict[str, Delta] = {}
        self.keep_statistics(lm, layers)
        with lm.restored_afterwards():
            for i, layer in lm.progress.each("writing", [*enumerate(layers)], unit="layers"):
                keys = subjects.keys(layer)  # (facts, in)
                missing = z - subjects.states(layers[-1], self.rules.site)  # (facts, hidden)
                right = least_squares(
                    self.whitening(lm, layer),
                    keys,
                    regularization=self.regularization,
                    weight=self.covariance_weight,
                    names=[edit.text for edit in edits],
                )  # (facts, in)
                change = {lm.parts.value[layer]: as_delta(missing / (len(layers) - i) ** self.distance_power, right)}
                lm.apply(make_patch(self, lm, edits, change))
                deltas |= change
        return make_patch(self, lm, edits, deltas, notes={"layers": list(layers), "losses": found.losses})
