"""Writing what is missing of wanted states over a band of layers (MEMIT, arXiv 2210.07229, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from reknow.checks.bounds import Formerly, NonNegative
from reknow.contract import check_edits, make_patch
from reknow.editing.keys import held_keys, kept_keys
from reknow.editing.layers import resolve_layers
from reknow.editing.search import ValueSearchMethod
from reknow.editing.solvers import least_squares
from reknow.editing.values import Values, find_values
from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.patching.deltas import Delta, as_delta
from reknow.patching.patches import Patch
from reknow.patching.state_spec import StateSpec

__all__ = ["BandMethod"]


@dataclass(frozen=True, kw_only=True)
class BandMethod(ValueSearchMethod):
    """A method that writes what is missing over a band of layers: MEMIT, PMET."""

    edits_per_call: ClassVar[int] = 16
    distance_power: ClassVar[float] = 1.0
    """A layer gets what is missing by the number of layers left to this power (PMET: 0.5)."""
    state_spec: ClassVar[StateSpec] = StateSpec({"keys.*?": "float32 edits in.*"})

    layers: tuple[int, ...] | None = None
    """Layers whose value matrices are changed; None: a sixth of the model, five at most, around `suggest_layer`."""
    regularization: Annotated[NonNegative, Formerly("stiffness")] = 0.1
    """λ in units of the keys' mean kᵀC⁻¹k: by itself a fact gets 1 / (1 + this) of its change in a layer. Not read
    where `covariance_weight` is given."""
    hold_earlier: bool = False
    """Hold the outputs of the keys that applied patches with this setting wrote, as AlphaEdit does: λC + K_p K_pᵀ in
    place of λC. The keys of an edit travel in its patch."""
    covariance_weight: NonNegative | None = None
    """λ as a number, in place of `regularization`: MEMIT 15,000 (GPT-J), 20,000 (GPT-2 XL); PMET 6,000 (GPT-J)."""

    def edit_each(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        edits = [check_edits(self, edit, lm)[0] for edit in edits]
        layers = resolve_layers(lm, self.layers)
        found = self.find_states(lm, edits, layers, apart=True)
        return [self.distribute_residual(lm, [edit], layers, found.of(i)) for i, edit in enumerate(edits)]

    def find_states(self, lm: LM, edits: Sequence[Edit], layers: Sequence[int], *, apart: bool = False) -> Values:
        """z behind the last layer of the band; with forward targets behind the first."""
        at = layers[0] if self.rules.forward_targets else layers[-1]
        return find_values(lm, edits, at, self.contexts(lm), self, apart=apart)

    def distribute_residual(self, lm: LM, edits: Sequence[Edit], layers: Sequence[int], found: Values) -> Patch:
        """The patch that brings the subjects to z behind the last layer, a part of what is missing in each;
        with forward targets behind every layer, by all that is missing there."""
        forward, site, subjects = self.rules.forward_targets, self.rules.site, self.subjects(lm, edits)
        wanted = subjects.carried_forward(found.delta, layers, site) if forward else [exact(found.z)] * len(layers)
        deltas: dict[str, Delta] = {}
        state: dict[str, Tensor] = {}
        self.keep_statistics(lm, layers)
        with lm.restored_afterwards():
            for i, layer in lm.progress.each("writing", [*enumerate(layers)], unit="layers"):
                at = layer if forward else layers[-1]
                missing = wanted[i] - subjects.states(at, site)  # (facts, hidden)
                shares = 1 if forward else (len(layers) - i) ** self.distance_power
                right = self._keys_side(lm, edits, layer, subjects.keys(layer))  # (facts, in)
                change = {lm.parts.value[layer]: as_delta(missing / shares, right)}
                lm.apply(make_patch(self, lm, edits, change))
                deltas |= change
            for layer in layers if self.hold_earlier else ():
                state[kept_keys(lm.parts.value[layer])] = subjects.keys(layer).float()
        notes = {"layers": list(layers), "losses": found.losses}
        return make_patch(self, lm, edits, deltas, state=state, notes=notes)

    def _keys_side(self, lm: LM, edits: Sequence[Edit], layer: int, keys: Tensor) -> Tensor:
        """The keys' side of ΔW. keys and result: (facts, in)"""
        past = held_keys(lm, self.name, edits, lm.parts.value[layer], keys) if self.hold_earlier else []
        return least_squares(
            self.whitening(lm, layer),
            keys,
            regularization=self.regularization,
            weight=self.covariance_weight,
            past=torch.cat(past) if past else None,
            names=[edit.text for edit in edits],
        )
