"""ROME: Locating and Editing Factual Associations in GPT. Meng, Bau, Andonian, Belinkov 2022, arXiv 2202.05262.

The value matrix W of one layer is a linear memory: key k (the subject) → value v (what is known of it). The value
v* = v + δ that makes the model answer with the new object is found by gradient descent (`reknow.editing.values`), and
W is changed by the rank-one matrix that maps the subject's key k* to v* and disturbs the keys of general text, whose
covariance is C, the least:

    ΔW = (v* − W k*) (C⁻¹ k*)ᵀ / ((C⁻¹ k*)ᵀ k*)                                                          (eq. 2)

R-ROME (Gupta, Baskaran, Anumanchipalli 2024, arXiv 2403.07175) uses one key, the mean over contexts, in all places;
the authors' ROME uses it inside C⁻¹ k* only and the bare prompt's key elsewhere, which can wreck the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from reknow.checks.bounds import Formerly, Natural, Number, Rate
from reknow.contract import check_edits, make_patch
from reknow.editing.layers import resolve_layer
from reknow.editing.search import SearchRules, ValueSearchMethod
from reknow.editing.sequence import edit_sequentially
from reknow.editing.solvers import rank_one
from reknow.editing.values import find_values
from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.patching.patches import Patch


@dataclass(frozen=True, kw_only=True)
class ROME(ValueSearchMethod):
    """Rank-one model editing, one fact after the other."""

    edits_per_call: ClassVar[int] = 16

    layer: int | None = None
    """Layer whose value matrix is changed; None: `suggest_layer`."""
    clamp: Rate = 4.0
    """Largest length of the addition, relative to what it is added to, as in the authors' code."""
    context_batches: Annotated[Number, Formerly("turns")] = 5
    context_groups: tuple[tuple[Number, Number], ...] = ((10, 5), (10, 10))
    context_first_words: Annotated[tuple[str, ...], Formerly("context_starts", also={"context_source": "model"})] = ()
    covariance_tokens: Natural | None = None
    """Tokens of general text for C; None: twenty for each input of the matrix, 100,000 at most; 0: C is the
    identity."""
    average_keys: bool = False
    """Use the mean key and the mean value everywhere, as R-ROME does."""

    @property
    def name(self) -> str:
        return "r-rome" if self.average_keys else "rome"

    @property
    def rules(self) -> SearchRules:
        return SearchRules(site="value")

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits, lm)
        return edit_sequentially(lm, edits, lambda edit: self._rank_one_patches(lm, [edit])[0])

    def edit_each(self, lm: LM, edits: Sequence[Edit]) -> list[Patch]:
        return self._rank_one_patches(lm, [check_edits(self, edit, lm)[0] for edit in edits])

    def _rank_one_patches(self, lm: LM, edits: list[Edit]) -> list[Patch]:
        """Of each edit by itself a patch of rank one for the model as it is; their v* are searched in one batch."""
        layer = resolve_layer(lm, self.layer)
        found = find_values(lm, edits, layer, self.contexts(lm), self)
        mean_key = exact(found.mean_key)  # (edits, in)
        u = mean_key
        if self.covariance_tokens != 0:
            u = self.whitening(lm, layer).solve(mean_key)  # C⁻¹ k*
        key, value = (mean_key, found.mean_value) if self.average_keys else (exact(found.key), found.value)
        residual = exact(found.value) + exact(found.delta) - exact(value)  # v* − W k*, (edits, hidden)
        patches = []
        for i, edit in enumerate(edits):
            change = rank_one(u[i], key[i], residual[i])
            notes = {"layer": layer, "losses": found.losses[i]}
            patches.append(make_patch(self, lm, [edit], {lm.parts.value[layer]: change}, notes=notes))
        return patches
