"""SimIE: Towards Lifelong Model Editing via Simulating Ideal Editor. Guo et al. 2025, ICML 42, OpenReview VdEG08ZJCH.

A wrapper of any method that changes weights. An ideal editor would make each edit on the model as it first was, and
all of them hold: what it asks of a matrix is that for the inputs K_i of edit i it put out what the matrix Ŵ_i of that
edit alone puts out. SimIE is the regularised solution of all these demands at once, carried on edit by edit.

    min over W of  Σ_i ‖(W − Ŵ_i) K_i‖² + λ ‖W − W₀‖²
    P_t = P_{t−1} + K_t K_tᵀ,  P_0 = λI;   W_t = W_{t−1} + (Ŵ_t − W_{t−1}) K_t K_tᵀ P_t⁻¹

K are the matrix' inputs at all tokens of prompt and answer. They travel in the patches, and ΔW, which is
(Ŵ_t − W_{t−1}) K_t times K_tᵀ P_t⁻¹, has a rank for each token.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from reknow.checks.bounds import Name, Rate, Units
from reknow.contract import Method, check_edits, field_values, make_patch
from reknow.editing.compromise import Compromise
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.hooks import by_row, recorded
from reknow.model.tokens import Text
from reknow.patching.deltas import Delta, add_deltas
from reknow.patching.patches import Patch, merged_away
from reknow.patching.state_spec import StateSpec
from reknow.registry import make


@dataclass(frozen=True)
class SimIE(Method):
    """All edits of a sequence, each as another method makes it alone, solved for together."""

    state_spec: ClassVar[StateSpec] = StateSpec(
        {"inputs.*?": "float32 tokens.* in.*", "gram.*?": "float32 in.* in.*", "unit.*": "float32"}
    )

    base: Name = "rome"
    """Name of the method that makes the edits, in the table of methods; any that changes weights."""
    base_settings: str = "{}"
    """Its fields that differ from the defaults, as JSON."""
    ridge: Rate = 10.0
    """λ: what is left of a change for the sake of the first weights."""
    units: Units = "relative"
    """`relative`: λ is a multiple of the mean square of the inputs of a sequence's first edit; `absolute`: it is a
    plain number, as in the paper's code."""
    afresh: bool = True
    """Make each edit on the model without those before, as EasyEdit does; else on the model as it is, Ŵ_t − W_{t−1}
    being its change, the default of the authors' code. A base that goes on from what its own patches keep, such as
    AlphaEdit, is refused then: SimIE's patches do not have it."""

    def __post_init__(self):
        super().__post_init__()
        self._checked(self._base())

    @property
    def name(self) -> str:
        return "simie"

    def _base(self) -> Method:
        try:
            settings = json.loads(self.base_settings)
        except ValueError as error:
            raise _no_settings(self.base_settings) from error
        if not isinstance(settings, dict):
            raise _no_settings(self.base_settings)
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        try:
            return make(self.base, lists)
        except InputError as error:
            raise InputError(f"expected base and base_settings of a method; got {self.base!r}: {error}") from error

    def _checked(self, base: Method) -> Method:
        """The base; raises InputError where it changes no weights, or is SimIE itself."""
        if base.kind != "weights" or base.name == self.name:
            raise InputError(f"expected a method that changes weights as base; got {self.base}: name rome, say")
        return base

    def check(self, edits: Sequence[Edit]) -> None:
        self._base().check(edits)

    def seen(self, lm: LM, edits: Sequence[Edit]) -> list[Edit]:
        return self.at_work(lm).seen(lm, edits)

    def at_work(self, lm: LM) -> Method:
        return self._checked(self._base().resolve(lm))

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, base = check_edits(self, edits, lm), self.at_work(lm)
        earlier = [patch for patch in lm.patches if patch.method == self.name]
        self._refuse_others(earlier)
        _warn_of_corrections(earlier, edits)
        others = tuple(patch for patch in lm.patches if patch.method != self.name)
        found: dict[str, Compromise] = {}
        for group in [edits] if self.afresh else [[edit] for edit in lm.progress.each("edits", edits)]:
            so_far = [make_patch(self, lm, edits, {n: one.change for n, one in found.items()})] if found else []
            with lm.stacked(others if self.afresh else (*lm.patches, *so_far)):
                patches = base.edit_each(lm, group)
                self._refuse_continuing(patches)
                made = [(patch.deltas, _inputs(lm, e, patch)) for e, patch in zip(group, patches, strict=True)]
            for name in dict.fromkeys(name for deltas, _ in made for name in deltas):
                own = [(deltas[name], keys[name]) for deltas, keys in made if name in deltas]
                if name not in found:
                    found[name] = self._begin(name, earlier, *own[0])
                found[name].take(own, from_first=self.afresh)
        for patch in earlier:
            if not patch.deltas.keys() & found.keys():  # its base took another layer by default, say
                warnings.warn(
                    f"{patch.label} wrote in {', '.join(patch.deltas)}, so its edits have no part in what is solved "
                    f"in {', '.join(found)}: name the layers in base_settings",
                    stacklevel=1,
                )
        state = {f"inputs.{name}": one.inputs for name, one in found.items()}
        state |= {f"unit.{name}": torch.tensor(one.unit) for name, one in found.items()}
        return make_patch(self, lm, edits, {n: one.change for n, one in found.items()}, state=state)

    def _begin(self, name: str, earlier: Sequence[Patch], change: Delta, keys: Tensor) -> Compromise:
        """The matrix as the patches before left it. ΔW of the first edit and its inputs (tokens, in)"""
        before = [patch for patch in earlier if name in patch.deltas]
        moved = add_deltas(exact(torch.zeros(change.shape)), [patch.deltas[name] for patch in before])
        own = 1.0 if self.units == "absolute" else float(keys.square().mean())
        unit = float(before[0].state[f"unit.{name}"]) if before else own
        return Compromise(self.ridge * unit, unit, moved, [_kept(patch, name) for patch in before])

    def _refuse_continuing(self, patches: Sequence[Patch]) -> None:
        """Raises InputError where the base goes on from what its patches keep, and would find none of it."""
        if not self.afresh and any(patch.state for patch in patches):
            raise InputError(
                f"expected a base whose edits need only the weights, for afresh=False; {self.base} goes on from what "
                "its own patches keep, which are not applied: leave afresh=True, or edit with it alone"
            )

    def _refuse_others(self, earlier: Sequence[Patch]) -> None:
        """Raises InputError where a patch on the stack was made with other settings, or has lost its inputs."""
        own = field_values(self)
        for patch in earlier:
            if any(f"unit.{name}" not in patch.state for name in patch.deltas):
                raise merged_away(patch, "inputs")
            if differ := [field for field, value in own.items() if patch.settings.get(field) != value]:
                raise InputError(
                    f"expected a sequence to go on with the settings of its patches; got {', '.join(differ)} other "
                    f"than in {patch.label}: set them alike, or take it off"
                )


def _kept(patch: Patch, name: str) -> Tensor:
    """The inputs that a patch keeps of a matrix; where it keeps their Σ K Kᵀ, as patches used to, rows that have the
    same. (rows, in), float64"""
    if (keys := patch.state.get(f"inputs.{name}")) is not None:
        return exact(keys).cpu()
    values, vectors = torch.linalg.eigh(exact(patch.state[f"gram.{name}"]).cpu())
    return (vectors * values.clamp(min=0).sqrt()).T


def _warn_of_corrections(earlier: Sequence[Patch], edits: Sequence[Edit]) -> None:
    """Warns where an edit asks what one before it asks and wants another answer: between the demands is neither."""
    before = {edit.text: (edit.target_new, patch.label) for patch in earlier for edit in patch.edits}
    for edit in edits:
        answer, label = before.get(edit.text, (edit.target_new, ""))
        if answer != edit.target_new:
            warnings.warn(
                f"simie holds all edits of a sequence, and {edit.text!r} was to be {answer!r} in {label}, so neither "
                "answer is given in full: take that patch off first",
                stacklevel=1,  # said once, whoever calls
            )


def _no_settings(text: str) -> InputError:
    return InputError(f'expected base_settings as JSON, such as {{"layer": 5}}; got {text[:60]!r}: correct it')


def _inputs(lm: LM, edit: Edit, patch: Patch) -> dict[str, Tensor]:
    """What each matrix of the patch gets at all tokens of the edit's prompt and answer. (tokens, in), float64"""
    batch, names = lm.pad(lm.encode([Text.asked(edit)])), list(patch.deltas)
    with torch.no_grad(), recorded(lm.model, inputs=names, stop=True) as (seen, _):
        lm.forward(batch.ids, batch.mask, batch.positions, None)
    return {name: exact(by_row(seen[name], 1)[0]).cpu() for name in names}
