"""AlphaEdit: Null-Space Constrained Knowledge Editing. Fang, Jiang, Wang, Ma, Wang, He, Chua 2024, arXiv 2410.02355.

MEMIT, but ΔW may only act on directions that the keys of general text hardly use: P projects on them. What earlier
edits wrote is protected by their keys K_p, so that edits can be made one after another without end.

    R = (z − h) / (L − l + 1),   ΔW = R K₁ᵀP (K_p K_pᵀP + K₁K₁ᵀP + L2 · I)⁻¹                               (eq. 14)

The keys of an edit are taken once all its layers are written, and travel in its patch: K_p are the keys of the
patches that are applied when the next edit is made. BetaEdit and EvoEdit change P (`reknow.editing.null_spaces`),
SPHERE spares directions of W itself (`reknow.editing.principal`). Two more plug-ins:

* BLUE (Li et al. 2025, arXiv 2502.03748): only the first and the last layer of the band, each with its own z, which
  is searched when the layer's turn comes, and with all that is missing.
* NAS (Liu et al. 2026, arXiv 2602.02543): the wanted value v* = v + δ is scaled to a reference norm of the unedited
  model, and left at v where it is more than twice as long, so that norms cannot grow from edit to edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from reknow.checks.bounds import Formerly, NonNegative, Number, Share
from reknow.contract import check_edits, make_patch
from reknow.editing.keys import held_keys, kept_by_earlier, kept_keys
from reknow.editing.layers import resolve_layers
from reknow.editing.norm_anchor import anchor_states
from reknow.editing.null_spaces import LeakyNullSpace, leaky_null_space, refreshed_with, remaining
from reknow.editing.principal import principal_directions, spare_directions
from reknow.editing.search import ValueSearchMethod
from reknow.editing.solvers import least_squares, null_space
from reknow.editing.values import Values, find_values
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.patching.deltas import Delta, as_delta
from reknow.patching.patches import Patch
from reknow.patching.state_spec import StateSpec


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(ValueSearchMethod):
    """Mass editing in the null space of general text, made for edit after edit."""

    edits_per_call: ClassVar[int] = 16
    state_spec: ClassVar[StateSpec] = StateSpec({"keys.*?": "float32 edits in.*", "anchor.*?": "float32 one"})

    layers: tuple[int, ...] | None = None
    """Layers whose value matrices are changed; None: a sixth of the model, five at most, around `suggest_layer`."""
    null_share: Share = 0.1
    """Weakest directions of general text that may change: those that carry this share of the trace of C, without the
    direction of an attention sink."""
    null_threshold: NonNegative | None = None
    """Eigenvalue of C below which a direction may change, instead of by `null_share`; 0.02 in the paper."""
    regularization: Annotated[NonNegative, Formerly("stiffness")] = 0.1
    """L2 in units of the projected keys' mean square norm. Not read where `l2` is given."""
    l2: NonNegative | None = None
    """L2 as a plain number, in place of `regularization`: 10 (GPT-2 XL, GPT-J, Llama 3)."""
    leakage: NonNegative = 0.0
    """λ₁ of BetaEdit, the weight of what general text has among those directions, in units of the keys' mean kᵀC⁻¹k
    there. Not read where `leakage_weight` is given."""
    leakage_weight: NonNegative | None = None
    """λ₁ as a plain number, in place of `leakage`: 3,000 in the authors' code."""
    refresh: Number | None = None
    """With leakage: edits after which the directions are found anew, of general text and of all edits before."""
    evolving: bool = False
    """Take the directions that an edit uses away from those that follow, as EvoEdit does, instead of holding keys."""
    suppression: Share = 0.0
    """α of SPHERE: how much of ΔW is taken away along the principal directions of the matrix itself."""
    principal_share: Share = 0.5
    """η of SPHERE: share of their spread that these directions carry."""
    boundary_layers: bool = False
    """Change the first and the last layer only, each with a z of its own, as BLUE does."""
    norm_anchor: bool = False
    """Scale v* to its mean norm over the edits of the first applied patch, as NAS does (the paper: 1,000 facts)."""

    def __post_init__(self):
        super().__post_init__()
        if self.evolving and self._penalises_leakage:
            raise InputError("expected evolving or leakage; got both: leave one of them out")
        if self.refresh and not self._penalises_leakage:
            raise InputError(f"expected leakage with refresh={self.refresh}; got none: set it, or leave refresh out")

    @property
    def name(self) -> str:
        if self._penalises_leakage or self.evolving:
            return "evoedit" if self.evolving else "betaedit"
        return "sphere" if self.suppression else "alphaedit-blue" if self.boundary_layers else "alphaedit"

    @property
    def _penalises_leakage(self) -> bool:
        return bool(self.leakage or self.leakage_weight)

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        return self._write(lm, check_edits(self, edits, lm))

    def edit_each(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        if self.boundary_layers:  # the second z is searched with the first layer written
            return super().edit_each(lm, edits)
        edits = [check_edits(self, edit, lm)[0] for edit in edits]
        self.check_null_space(lm, layers := resolve_layers(lm, self.layers))
        found = find_values(lm, edits, layers[-1], self.contexts(lm), self)
        return [self._write(lm, [edit], found.of(i)) for i, edit in enumerate(edits)]

    def _write(self, lm: LM, edits: Sequence[Edit], found: Values | None = None) -> Patch:
        """The patch of the edits; what is searched is `found` unless that is not given."""
        layers = resolve_layers(lm, self.layers)
        if self.boundary_layers:
            layers = sorted({layers[0], layers[-1]})
        self.check_null_space(lm, layers)
        prefixes = self.contexts(lm)
        subjects = self.subjects(lm, edits)
        deltas: dict[str, Delta] = {}
        state: dict[str, Tensor] = {}
        z = None
        self.keep_statistics(lm, layers)
        with lm.restored_afterwards():
            for i, layer in lm.progress.each("writing", [*enumerate(layers)], unit="layers"):
                if z is None or self.boundary_layers:
                    target = layer if self.boundary_layers else layers[-1]
                    if found is None or self.boundary_layers:
                        found = find_values(lm, edits, target, prefixes, self)
                    z = self._wanted_states(lm, found, target, state)  # (facts, hidden)
                missing = z - subjects.states(target, "block")  # (facts, hidden)
                shares = 1 if self.boundary_layers else len(layers) - i
                right = self._keys_side(lm, edits, layer, subjects.keys(layer))  # (facts, in)
                change = {lm.parts.value[layer]: as_delta(missing / shares, right)}
                lm.apply(make_patch(self, lm, edits, change))
                deltas |= change
            for layer in layers:
                state[kept_keys(lm.parts.value[layer])] = subjects.keys(layer).float()
        if self.suppression:  # once all layers are written, as in SPHERE's code
            for name, change in deltas.items():
                directions = principal_directions(lm.weight(name), self.principal_share)
                deltas[name] = spare_directions(change, directions, self.suppression)
        notes = {"layers": list(layers), "losses": found.losses if found else []}
        return make_patch(self, lm, edits, deltas, state=state, notes=notes)

    def _keys_side(self, lm: LM, edits: Sequence[Edit], layer: int, keys: Tensor) -> Tensor:
        """The keys' side of ΔW. keys and result: (facts, in)"""
        earlier = held_keys(lm, self.name, edits, lm.parts.value[layer], keys)  # each (its facts, in)
        past, names = torch.cat(earlier) if earlier else None, [edit.text for edit in edits]
        if self._penalises_leakage:
            basis = self._leaky_metric(lm, layer, keys, earlier)
            return least_squares(basis, keys, weight=1.0, past=past, names=names)
        basis = self.from_covariance(lm, layer, null_space, self.null_share, self.null_threshold)
        weight = self._l2(keys, basis)
        if self.evolving and past is not None:
            basis, past = remaining(basis, past), None
        return least_squares(basis, keys, weight=weight, past=past, names=names)

    def _l2(self, keys: Tensor, basis: Tensor) -> float:
        """L2 as a plain number. keys: (facts, in); basis: (in, r)"""
        return float(self.regularization * (keys @ basis).square().sum(1).mean()) if self.l2 is None else self.l2

    def _leaky_metric(self, lm: LM, layer: int, keys: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        """BetaEdit's metric for an edit with these keys, behind edits with those. (in, r)"""
        rule = self.null_share, self.null_threshold
        space = self.from_covariance(lm, layer, leaky_null_space, *rule)
        if self.refresh and (count := refreshed_with([len(own) for own in earlier], self.refresh)):
            known = exact(torch.cat(list(earlier))[:count].to(keys.device))
            weight = self._leakage_weight(known, space)

            def refreshed(covariance: Tensor, *_made: str) -> LeakyNullSpace:
                protected = (known.T @ known / count + weight * exact(covariance)) / (1 + weight)
                return leaky_null_space(covariance, *rule, protected)

            digest = sha256(known.cpu().numpy().tobytes()).hexdigest()
            space = self.from_covariance(lm, layer, refreshed, *rule, self.leakage, self.leakage_weight, digest)
        return space.metric(self._leakage_weight(keys, space), self._l2(keys, space.basis))

    def _leakage_weight(self, keys: Tensor, space: LeakyNullSpace) -> float:
        """λ₁ as a plain number. keys: (facts, in)"""
        return self.leakage * space.typicality(keys) if self.leakage_weight is None else self.leakage_weight

    def _wanted_states(self, lm: LM, found: Values, layer: int, state: dict[str, Tensor]) -> Tensor:
        """z, with NAS if asked for; the reference norm is passed on from patch to patch. (facts, hidden)"""
        if not self.norm_anchor:
            return exact(found.z)
        name = f"anchor.{lm.parts.value[layer]}"
        known = kept_by_earlier(lm, name)
        z, anchor = anchor_states(found, known[0] if known else None)
        state[name] = anchor.float()
        return z
