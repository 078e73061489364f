"""UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing. Gu et al. 2025, arXiv 2505.14679.
StableEdit: More Edits, More Stable. Ma et al. 2026, arXiv 2605.11836 (`whiten`, `warm_up`).

Nothing is trained and nothing is searched. At the tokens that predict the answer the gradient says where a matrix'
output should go, h its input; both are normalised by what all edits so far looked like, and ΔW is the least change
that moves the outputs there.

    [ĥ; ĝ] = ([h; g] − μ) / σ            μ, σ: of all batches, this one included (lifelong normalisation)
    ĝ = Σ^(−1/2) (g − μ)                  StableEdit: their whole covariance (Algorithm 1)
    v_i = −η ‖ĥ_i‖² ĝ_i,   ΔW = Vᵀ (H Hᵀ + λI)⁻¹ H         H: the raw h, a row per token; one batch        (§3)

StableEdit warms up on other facts, so that μ and Σ mean something when the wanted ones come. The statistics travel in
the patches, so that a later edit continues them. A first token that has one huge state in all texts is held there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from reknow.checks.bounds import Formerly, Name, Natural, Number, Rate, Units
from reknow.contract import Method, check_edits, make_patch
from reknow.editing.layers import resolve_layers
from reknow.editing.sinks import first_token_inputs
from reknow.editing.solvers import least_squares
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.learning.gradients import TokenFactors, flat_factors
from reknow.learning.lifelong import LifelongNorms, readable, refuse_other_settings, stream_of
from reknow.lm import LM
from reknow.model.gates import gate_and_up
from reknow.model.tokens import EncodedText, Text
from reknow.patching.deltas import Delta, as_delta, sum_deltas
from reknow.patching.patches import Patch
from reknow.patching.record import Footprint
from reknow.patching.state_spec import StateSpec

_DEPTH = (0.64, 0.96)
"""Where the paper's layers begin and end, as a share of the model's (18–26 of 28 in GPT-J)."""
_RATE_OF_ALL = 2.0
"""The default η of all layers together; measured, see docs/log.md."""
_ABSOLUTE_RATE = 1e-6
_Deltas = dict[str, Delta]


@dataclass(frozen=True)
class UltraEdit(Method):
    """Lifelong editing in one backward pass per batch."""

    state_spec: ClassVar[StateSpec] = StateSpec(
        {"norm.*.count?": "float32", "norm.*.mean?": "float32 size.*", "norm.*.squares?": "float32 size.*"}
        | {"whitening.*.count?": "float32", "whitening.*.mean?": "float32 gradient.*"}
        | {"whitening.*.rows?": "float32 tokens.* gradient.*"}
        | {"whitening.*.scatter?": "float32 gradient.* gradient.*"}
    )

    layers: tuple[int, ...] | None = None
    """Layers that are changed; None: at the paper's depth, two thirds up to the last but one."""
    matrices: Literal["value", "up"] = "value"
    """Which of the MLP's: the matrix that writes to the residual stream (GPT-J), or those that read it (Llama)."""
    gate_layers: tuple[int, ...] | None = None
    """Layers whose gate is changed, where these are not those of up, as in Llama 3. With `matrices="up"` alone."""
    batch_size: Annotated[Number, Formerly("turn")] = 100
    """Edits that are made at once; more than these are made batch by batch."""
    learning_rate: Annotated[Rate | None, Formerly("learning_rate_absolute", also={"units": "absolute"})] = None
    """η: how far an output moves for a normalised gradient of 1. None: 2 divided by the number of layers, 1 at most,
    since what the layers add lies in one direction; in absolute units the paper's 1e-6."""
    units: Units = "relative"
    """`relative`: η is a multiple of the outputs' root mean square, as W's entries and ‖h‖ make it; `absolute`: it is
    a plain number, as in the paper (1e-6)."""
    ridge: Rate = 1.0
    """λ: weight of the identity in the least squares."""
    min_tokens: Annotated[Natural, Formerly("least_tokens")] = 32
    """While fewer tokens were seen, statistics mean little: every h and g is divided by its own root mean square."""
    whiten: bool = False
    """StableEdit: multiply gradients by Σ^(−1/2), once more tokens were seen than a gradient has numbers; else divide
    them by their deviations."""
    whitening_floor: Rate = 1.0
    """Smaller eigenvalues of Σ count as so large: a share of their mean, in absolute units a plain number."""
    warm_up: Name | None = None
    """StableEdit: other facts, NAME, NAME:FILE or FILE, read before edits where no patch on the stack knows them."""
    warm_up_edits: Number = 2000
    """How many of them at most."""
    warm_up_writes: bool = False
    """Edit them too, as Algorithm 1 does, in the first patch; else only their gradients enter the statistics."""
    hold_first_token: bool = True
    """Whether H has a row for the first token, with v = 0, where its h is one in all texts. Not in the papers."""

    def __post_init__(self):
        super().__post_init__()
        if self.gate_layers is not None and self.matrices == "value":
            got = f"{self.gate_layers} with 'value', which has no gate"
            raise InputError(f"expected gate_layers with matrices='up'; got {got}: leave them out, or set matrices")

    @property
    def name(self) -> str:
        return "stableedit" if self.whiten else "ultraedit"

    def _layers(self, lm: LM) -> list[int]:
        first, last = (round(share * lm.layers) for share in _DEPTH)
        own = range(min(first, lm.layers - 1), max(last, first + 1))
        return resolve_layers(lm, own if self.layers is None else self.layers)

    def footprint(self, lm: LM) -> Footprint:
        gates = [] if self.gate_layers is None else resolve_layers(lm, self.gate_layers)
        return Footprint(sorted({*self._layers(lm), *gates}), takes_gradient=True)

    def seen(self, lm: LM, edits: Sequence[Edit]) -> list[Edit]:
        known = {edit.text for edit in stream_of(self.warm_up, self.warm_up_edits)}
        return [edit for edit in edits if edit.text in known]

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, names = check_edits(self, edits, lm), self._matrices(lm)
        before = [patch for patch in lm.patches if patch.method in ("ultraedit", "stableedit")]
        refuse_other_settings(before, self, names)
        norms, deltas, warmed = self._norms(before), _Deltas(), 0
        if self.warm_up is not None and not any("warm_up" in patch.notes for patch in before):
            own = {edit.text for edit in edits}
            stream = [edit for edit in stream_of(self.warm_up, self.warm_up_edits) if edit.text not in own]
            norms, deltas, warmed = self._warm(lm, stream, self.warm_up, names, before)
        deltas, losses = self._write(lm, names, lm.encode([Text.asked(edit) for edit in edits]), norms, deltas)
        notes = {"layers": self.footprint(lm).layers, "losses": losses} | ({"warm_up": warmed} if warmed else {})
        return make_patch(self, lm, edits, deltas, state=norms.state(), notes=notes)

    def _norms(self, before: Sequence[Patch]) -> LifelongNorms:
        floor = self.whitening_floor if self.whiten else None
        return LifelongNorms(before, floor=floor, relative=self.units == "relative")

    def _write(
        self, lm: LM, names: Sequence[str], rows: Sequence[EncodedText], norms: LifelongNorms, deltas: _Deltas
    ) -> tuple[_Deltas, list[float]]:
        """The changes so far with those of these edits, made batch by batch, and the loss before each."""
        losses = []
        for start in lm.progress.each("edits", range(0, len(rows), self.batch_size), unit="batches"):
            # The statistics so far are part of what the next batch needs, the changes too.
            with lm.patched(*([make_patch(self, lm, [], deltas)] if deltas else [])):
                factors, loss = flat_factors(lm, names, rows[start : start + self.batch_size], answers_only=True)
                norms.observe(factors)
                batch = self._batch_deltas(lm, factors, self._rate(lm), norms)
            deltas = {n: sum_deltas([deltas[n], delta]) if n in deltas else delta for n, delta in batch.items()}
            losses.append(loss)
        return deltas, losses

    def _rate(self, lm: LM) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return _ABSOLUTE_RATE if self.units == "absolute" else min(1.0, _RATE_OF_ALL / len(self._layers(lm)))

    def _matrices(self, lm: LM) -> list[str]:
        """Names of the matrices that are changed, layer by layer."""
        layers = self._layers(lm)
        if self.matrices == "value":
            return [lm.parts.value[layer] for layer in layers]
        if self.gate_layers is None:
            return [name for layer in layers for name in lm.mlp_in(layer)]
        gates = [gate_and_up(lm, layer)[0] for layer in resolve_layers(lm, self.gate_layers)]
        return [*gates, *(gate_and_up(lm, layer)[1] for layer in layers)]

    def _warm(
        self, lm: LM, stream: Sequence[Edit], address: str, names: Sequence[str], before: Sequence[Patch]
    ) -> tuple[LifelongNorms, _Deltas, int]:
        """Statistics and changes of the stream, and how many of its facts fit into the model's positions."""

        def write() -> tuple[LifelongNorms, _Deltas, int]:
            rows, norms = readable(lm, stream, address), self._norms(before)
            if self.warm_up_writes:
                return norms, self._write(lm, names, rows, norms, {})[0], len(rows)
            norms.observe(flat_factors(lm, names, rows, answers_only=True)[0])
            return norms, {}, len(rows)

        place = ("warm_up", self, tuple(patch.id for patch in lm.patches), tuple(edit.text for edit in stream))
        norms, deltas, count = lm.cached(place, write)
        return copy.deepcopy(norms), deltas, count

    def _batch_deltas(self, lm: LM, factors: TokenFactors, rate: float, norms: LifelongNorms) -> _Deltas:
        """ΔW of one batch's factors, which are in the statistics already."""
        deltas = {}
        held = first_token_inputs(lm, list(factors)) if self.hold_first_token else {}
        for name, (h, g) in factors.items():
            h_hat, g_hat = norms.normalised(h, g, self.min_tokens)
            step = rate
            if self.units == "relative":
                output = lm.base_weight(name).float().square().mean().sqrt() * h.norm(dim=1).mean()
                step *= float(output) / h.shape[1]
            v = -step * h_hat.square().sum(1, keepdim=True) * g_hat  # (n, out)
            right = least_squares(None, h, weight=self.ridge, past=held.get(name))  # (n, in)
            deltas[name] = as_delta(v, right.float().to(v.device))
        return deltas
