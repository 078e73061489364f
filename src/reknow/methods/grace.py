"""GRACE: Aging with GRACE, Lifelong Model Editing with Discrete Key-Value Adaptors. Hartvigsen et al. 2022,
arXiv 2211.11031.

A codebook stands beside one matrix of the model. A prompt whose last token enters the matrix close to a key, within
that key's radius ε, leaves it as the key's value, which was trained to bring about the edit; others pass unchanged:

    out = v_i  where  d = min_i ‖x − k_i‖ ≤ ε_i,   else W x

A new edit falls far from all keys, and is added; close to a key with the same answer, whose radius grows to hold it;
or close to one with another answer, and both radii shrink to half their distance (Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reknow.checks.bounds import NonNegative, Rate, Units
from reknow.editing.descent import adam_update, descend
from reknow.edits import Edit
from reknow.errors import EditRefused, InputError
from reknow.files.schema import Count, Listed, Strict
from reknow.lm import LM
from reknow.memories.base import SideModuleMethod, memory_patch, prepare
from reknow.memories.codebook import Codebook
from reknow.memories.distances import distance_scale, prompt_states
from reknow.model.forward_context import ForwardContext
from reknow.model.scored_tokens import AnswerLoss
from reknow.model.tokens import EncodedText, Text
from reknow.patching.memory import Hooks, hook_output
from reknow.patching.patches import Patch
from reknow.patching.state_spec import CountedBy, StateSpec, check_matrix

_Replacement = Literal["prompt", "last", "before"]


class VersionFields(Strict):
    """What a version knows besides its tensors."""

    modules: list[str] = Field(min_length=1, max_length=1)
    replacement: _Replacement
    labels: Annotated[Listed[Listed[Count]], CountedBy("keys")]
    """Tokens of each key's answer."""


@dataclass(frozen=True)
class GRACE(SideModuleMethod):
    """A codebook of edits beside one matrix of an MLP."""

    for_all = ("units", "replacement")
    depth: ClassVar[float] = 0.8
    """The papers' layers as a share of the depth: 35 of 48 (GPT-2 XL), 27 of 32 (Llama-2)."""
    state_spec: ClassVar[StateSpec] = StateSpec(
        {"slots": "int64 keys", "keys": "float32 keys in", "values": "float32 keys out", "radii": "float32 keys"},
        VersionFields,
    )

    epsilon: NonNegative = 0.9
    """Radius ε of a new key, in units of the distance there between questions that differ in the subject alone."""
    learning_rate: Rate = 0.3
    """Learning rate of Adam, in units of the root mean square of the matrix's output."""
    site: Literal["value", "mlp_in"] = "value"
    """The matrix beside which the codebook stands: the value matrix; or, as the authors have it in GPT-2 XL, the
    MLP's first one, where it is one: a gate apart from it is refused, a fused one has its share of the values."""
    replacement: _Replacement = "prompt"
    """Where the value is put: at all tokens of the prompt; at its last; or, as the authors' code does, at all before
    the last."""
    units: Units = "relative"
    """`absolute`: ε and the learning rate are plain numbers (both 1 in the papers), and values start uniform in
    [0, 1) instead of at the matrix's own output."""

    @property
    def name(self) -> str:
        return "grace"

    def modules(self, lm: LM, layer: int) -> list[str]:
        names = super().modules(lm, layer) if self.site == "value" else list(lm.mlp_in(layer))
        if len(names) > 1:
            raise InputError(
                f"expected an MLP with one first matrix for site mlp_in; got {' and '.join(names)}: set site to value"
            )
        return names

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, layer, modules, stored, notes = prepare(self, lm, edits)
        rows = lm.encode([Text.asked(edit) for edit in edits])
        for edit, row in zip(edits, rows, strict=True):
            if self.replacement == "before" and (layer == lm.layers - 1 or row.prompt_length < 2):
                raise EditRefused(
                    "expected a layer below the last, and a token before the prompt's last, for replacement before, "
                    f"which no answer sees otherwise; got layer {layer} for {edit.text!r}: set replacement to prompt",
                    edit,
                )
        keys, outputs = prompt_states(lm, rows, modules[0])
        width_in, width_out, device = keys.shape[1], outputs.shape[1], keys.device
        book = Codebook.of(stored, device) if stored else Codebook.empty(width_in, width_out, device)
        scale = 1.0 if self.units == "absolute" else distance_scale(lm, modules[0])
        slots = [
            book.insert(key, row.target_ids, self.epsilon * scale, scale) for key, row in zip(keys, rows, strict=True)
        ]
        notes["losses"] = self._train(lm, rows, modules[0], book, torch.tensor(slots, device=device), outputs)
        changed = sorted(book.changed)
        state = {"slots": torch.tensor(changed), "keys": book.keys[changed]}
        state |= {"values": book.values[changed], "radii": book.radii[changed]}
        labels = [list(book.answers[slot]) for slot in changed]
        memory = {"modules": modules, "replacement": self.replacement, "labels": labels}
        notes |= {"slots": slots, "keys": len(book.keys)}
        return memory_patch(self, lm, edits, state, memory=memory, notes=notes)

    def _train(
        self, lm: LM, rows: Sequence[EncodedText], module: str, book: Codebook, slots: Tensor, outputs: Tensor
    ) -> list[float]:
        """Learns the values of the edits; gives the mean loss before every update.

        Args:
            module: the matrix.
            slots: (edits,) number of each edit's key.
            outputs: (edits, out) what the matrix gives at each prompt's last token.
        """
        trained, value_of = slots.unique(return_inverse=True)  # (values,), (edits,)
        first = [int((value_of == i).nonzero()[0]) for i in range(len(trained))]  # an edit of each value
        start, scale = outputs[first], outputs[first].square().mean(1, keepdim=True).sqrt()
        if self.units == "absolute":
            generator = torch.Generator().manual_seed(self.seed)
            start, scale = torch.rand(start.shape, generator=generator).to(start), torch.ones_like(scale)
        new = torch.tensor([int(slot) in book.untrained for slot in trained], device=start.device)
        start = torch.where(new[:, None], start, book.values[trained])
        # Adam's steps have the size of the learning rate, so values are searched in units of `scale`.
        delta = torch.zeros_like(start, requires_grad=True)
        answers: AnswerLoss | None = None

        def replace(context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
            if answers is None:  # the pass that records the blocks below
                return outputs
            values = (start + scale * delta)[value_of[answers.batch.to(value_of.device)]]
            return _replaced(context, outputs, values, torch.ones_like(answers.batch).bool(), self.replacement)

        with lm.temporary_memory(self.name, Hooks({module: replace})), torch.enable_grad():
            answers = AnswerLoss(lm, rows, self.chosen_layer(lm))
            update = adam_update(torch.optim.Adam([delta], lr=self.learning_rate), delta, value_of)
            passes = descend([answers.nll], update, self.steps, lambda losses: losses < self.stop_loss)
        book.values[trained] = (start + scale * delta).detach()
        return [fmean(losses) for losses in passes]

    @staticmethod
    def running_memory(lm: LM, patches: Sequence[Patch]) -> _LookUp:
        memory = patches[-1].memory
        (module,) = memory["modules"]
        book = Codebook.of(patches, lm.device_of(module))
        check_matrix(lm, module, {"in": (book.keys, 1), "out": (book.values, 1)})
        return _LookUp(module, memory["replacement"], book)


@dataclass(eq=False)
class _LookUp:
    """The hook that looks prompts up in the codebook."""

    module: str
    replacement: _Replacement
    book: Codebook

    def attach(self, lm: LM):
        return [hook_output(lm, self.module, self._look_up)]

    def _look_up(self, context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
        def choose() -> Tensor:
            distances, slots = self.book.nearest(context.last_prompt_state(inputs))
            return torch.where(distances <= self.book.radii[slots], slots, -1)

        slots = context.decision(self, choose)  # (rows,)
        return _replaced(context, outputs, self.book.values[slots], slots >= 0, self.replacement)


def _replaced(
    context: ForwardContext, outputs: Tensor, values: Tensor, rows: Tensor, replacement: _Replacement
) -> Tensor:
    """The outputs (rows, columns, out) with the values (rows, out) of the chosen rows where `replacement` says."""
    where = context.last_of_prompt if replacement == "last" else context.of_prompt  # (rows, columns)
    if replacement == "before":
        where = where & ~context.last_of_prompt
    where = (where.to(outputs.device) & rows[:, None].to(outputs.device))[..., None]
    return torch.where(where, values[:, None].to(outputs.dtype), outputs)
