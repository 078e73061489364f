"""UltraEdit: Training-, Subject- and Memory-Free Lifelong Editing. Gu et al. 2025, arXiv 2505.14679.

Nothing is trained and nothing is searched. At the tokens that predict the answer the gradient says where a matrix'
output should go, h its input; both are normalised by what all edits so far looked like, and ΔW is the least change
that moves the outputs there.

    [ĥ; ĝ] = ([h; g] − μ) / σ            μ, σ: of all batches, this one included (lifelong normalisation)
    v_i = −η ‖ĥ_i‖² ĝ_i,   ΔW = Vᵀ (H Hᵀ + I)⁻¹ H          H: the raw h, a row per token; one batch        (§3)

The statistics travel in the patches, so that a later edit continues them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from reknow.checks.bounds import Formerly, Natural, NonNegative, Number, Rate, Units
from reknow.contract import Method, check_edits, make_patch
from reknow.editing.layers import resolve_layers
from reknow.editing.solvers import cholesky, solve
from reknow.edits import Edit
from reknow.learning.blocks import RunningNorm
from reknow.learning.gradients import TokenFactors, flat_factors
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.tokens import Text
from reknow.patching.deltas import Delta, as_delta, sum_deltas
from reknow.patching.patches import Patch
from reknow.patching.record import Footprint
from reknow.patching.state_spec import StateSpec

_DEPTH = (0.64, 0.96)
"""Where the paper's layers begin and end, as a share of the model's (18–26 of 28 in GPT-J)."""
_RATE_OF_ALL = 2.0
"""The default η of all layers together; measured, see docs/log.md."""
_ABSOLUTE_RATE = 1e-6


@dataclass(frozen=True)
class UltraEdit(Method):
    """Lifelong editing in one backward pass per batch."""

    state_spec: ClassVar[StateSpec] = StateSpec(
        {"norm.*.count?": "float32", "norm.*.mean?": "float32 size.*", "norm.*.squares?": "float32 size.*"}
    )

    layers: tuple[int, ...] | None = None
    """Layers that are changed; None: at the paper's depth, two thirds up to the last but one."""
    matrices: Literal["value", "up"] = "value"
    """Which of the MLP's: the matrix that writes to the residual stream (GPT-J), or those that read it (Llama)."""
    batch_size: Annotated[Number, Formerly("turn")] = 100
    """Edits that are made at once; more than these are made batch by batch."""
    learning_rate: Annotated[Rate | None, Formerly("learning_rate_absolute", also={"units": "absolute"})] = None
    """η: how far an output moves for a normalised gradient of 1. None: 2 divided by the number of layers, 1 at most,
    since what the layers add lies in one direction; in absolute units the paper's 1e-6."""
    units: Units = "relative"
    """`relative`: η is a multiple of the outputs' root mean square, as W's entries and ‖h‖ make it; `absolute`: it is
    a plain number, as in the paper (1e-6)."""
    ridge: NonNegative = 1.0
    """Weight of the identity in the least squares."""
    min_tokens: Annotated[Natural, Formerly("least_tokens")] = 32
    """While fewer tokens were seen, statistics mean little: every h and g is divided by its own root mean square."""

    @property
    def name(self) -> str:
        return "ultraedit"

    def _layers(self, lm: LM) -> list[int]:
        first, last = (round(share * lm.layers) for share in _DEPTH)
        own = range(min(first, lm.layers - 1), max(last, first + 1))
        return resolve_layers(lm, own if self.layers is None else self.layers)

    def footprint(self, lm: LM) -> Footprint:
        return Footprint(self._layers(lm), takes_gradient=True)

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits, lm)
        layers = self._layers(lm)
        parts = [[name] for name in lm.parts.value] if self.matrices == "value" else lm.parts.mlp_in
        names = [name for layer in layers for name in parts[layer]]
        rate = self.learning_rate
        if rate is None:
            rate = _ABSOLUTE_RATE if self.units == "absolute" else min(1.0, _RATE_OF_ALL / len(layers))
        rows = lm.encode([Text.asked(edit) for edit in edits])
        before = _applied_norms(lm)
        own: dict[str, RunningNorm] = {}
        deltas: dict[str, Delta] = {}
        losses = []
        for start in lm.progress.each("edits", range(0, len(rows), self.batch_size), unit="batches"):
            # The statistics so far are part of what the next batch needs, the changes too.
            with lm.patched(*([make_patch(self, lm, edits, deltas)] if deltas else [])):
                factors, loss = flat_factors(lm, names, rows[start : start + self.batch_size], answers_only=True)
                batch = self._batch_deltas(lm, factors, rate, before, own)
            deltas = {n: sum_deltas([deltas[n], delta]) if n in deltas else delta for n, delta in batch.items()}
            losses.append(loss)
        state = {
            f"norm.{shape}.{part}": value for shape, norm in own.items() for part, value in norm.state_dict().items()
        }
        return make_patch(self, lm, edits, deltas, state=state, notes={"layers": layers, "losses": losses})

    def _batch_deltas(
        self,
        lm: LM,
        factors: TokenFactors,
        rate: float,
        before: dict[str, RunningNorm],
        own: dict[str, RunningNorm],
    ) -> dict[str, Delta]:
        """ΔW of one batch's factors, whose statistics go to `own` first."""
        for h, g in factors.values():
            shape = _shape(h, g)
            own.setdefault(shape, RunningNorm(h.shape[1] + g.shape[1]).to(h.device)).observe(torch.cat([h, g], 1))
        norms = {shape: before[shape].joined(norm) if shape in before else norm for shape, norm in own.items()}
        deltas = {}
        for name, (h, g) in factors.items():
            norm = norms[_shape(h, g)]
            if float(norm.count) >= max(2, self.min_tokens):
                h_hat, g_hat = norm(torch.cat([h, g], 1)).split([h.shape[1], g.shape[1]], 1)
            else:
                h_hat, g_hat = (x / x.square().mean(1, keepdim=True).sqrt() for x in (h, g))
            step = rate
            if self.units == "relative":
                output = lm.base_weight(name).float().square().mean().sqrt() * h.norm(dim=1).mean()
                step *= float(output) / h.shape[1]
            v = -step * h_hat.square().sum(1, keepdim=True) * g_hat  # (n, out)
            exact_h = exact(h)
            gram = exact_h @ exact_h.T  # (n, n)
            gram.diagonal().add_(self.ridge)
            right = solve(cholesky(gram), exact_h.T).T  # (n, in)
            deltas[name] = as_delta(v, right.float().to(v.device))
        return deltas


def _shape(h: Tensor, g: Tensor) -> str:
    """The name of the statistics that matrices of one shape share."""
    return f"{g.shape[1]}x{h.shape[1]}"


def _applied_norms(lm: LM) -> dict[str, RunningNorm]:
    """The statistics of the patches that are applied, by shape."""
    norms: dict[str, RunningNorm] = {}
    for patch in (patch for patch in lm.patches if patch.method == "ultraedit"):
        for shape in (key.split(".")[1] for key in patch.state if key.startswith("norm.") and key.endswith(".count")):
            norm = RunningNorm(len(patch.state[f"norm.{shape}.mean"])).to(lm.device)
            norm.load_state_dict({part: patch.state[f"norm.{shape}.{part}"] for part in norm.state_dict()})
            norms[shape] = norms[shape].joined(norm) if shape in norms else norm
    return norms
