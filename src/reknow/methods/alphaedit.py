"""AlphaEdit: Null-Space Constrained Knowledge Editing. Fang, Jiang, Wang, Ma, Wang, He, Chua 2024, arXiv 2410.02355.

MEMIT, but ΔW may only act on directions that the keys of general text hardly use: P projects on them. What earlier
edits wrote is protected by their keys K_p, so that edits can be made one after another without end.

    R = (z − h) / (L − l + 1),   ΔW = R K₁ᵀP (K_p K_pᵀP + K₁K₁ᵀP + L2 · I)⁻¹                               (eq. 14)

The keys of an edit are taken once all its layers are written, and travel in its patch: K_p are the keys of the
patches that are applied when the next edit is made. Two plug-ins:

* BLUE (Li et al. 2025, arXiv 2502.03748): only the first and the last layer of the band, each with its own z, which
  is searched when the layer's turn comes, and with all that is missing.
* NAS (Liu et al. 2026, arXiv 2602.02543): the wanted value v* = v + δ is scaled to a reference norm of the unedited
  model, and left at v where it is more than twice as long, so that norms cannot grow from edit to edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from reknow.checks.bounds import Formerly, NonNegative, Share
from reknow.contract import check_edits, make_patch
from reknow.editing.keys import Subjects
from reknow.editing.layers import resolve_layers
from reknow.editing.search import ValueSearchMethod
from reknow.editing.solvers import least_squares, null_space
from reknow.editing.values import Values, find_values
from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.patching.deltas import Delta, as_delta
from reknow.patching.patches import Patch
from reknow.patching.state_spec import StateSpec

_KEPT_NORMS = 0.95
"""The reference norm of NAS is the mean of ‖v*‖ over the edits without the largest twentieth."""


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
    boundary_layers: bool = False
    """Change the first and the last layer only, each with a z of its own, as BLUE does."""
    norm_anchor: bool = False
    """Scale v* to its mean norm over the edits of the first applied patch, as NAS does (the paper: 1,000 facts)."""

    @property
    def name(self) -> str:
        return "alphaedit-blue" if self.boundary_layers else "alphaedit"

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
        subjects = Subjects(lm, edits, prefixes)
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
                state[f"keys.{lm.parts.value[layer]}"] = subjects.keys(layer).float()
        notes = {"layers": list(layers), "losses": found.losses if found else []}
        return make_patch(self, lm, edits, deltas, state=state, notes=notes)

    def _keys_side(self, lm: LM, edits: Sequence[Edit], layer: int, keys: Tensor) -> Tensor:
        """The keys' side of ΔW. keys and result: (facts, in)"""
        past = self._earlier(lm, f"keys.{lm.parts.value[layer]}")  # each (its facts, in)
        return least_squares(
            self.from_covariance(lm, layer, null_space, self.null_share, self.null_threshold),
            keys,
            regularization=self.regularization,
            weight=self.l2,
            past=torch.cat(past) if past else None,
            names=[edit.text for edit in edits],
        )

    @staticmethod
    def _earlier(lm: LM, name: str) -> list[Tensor]:
        """What the applied patches of this method and its variant keep under the name."""
        made = [patch.state for patch in lm.patches if patch.method in ("alphaedit", "alphaedit-blue")]
        return [state[name] for state in made if name in state]

    def _wanted_states(self, lm: LM, found: Values, layer: int, state: dict[str, Tensor]) -> Tensor:
        """z, with NAS if asked for; the reference norm is passed on from patch to patch. (facts, hidden)"""
        if not self.norm_anchor:
            return exact(found.z)
        name = f"anchor.{lm.parts.value[layer]}"
        known = self._earlier(lm, name)
        z, anchor = anchor_states(found, known[0] if known else None)
        state[name] = anchor.float()
        return z


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
