"""CaliNet: Calibrating Factual Knowledge in Pretrained Language Models. Dong et al. 2022, arXiv 2210.03329.

An MLP is a memory of keys and values. Some more slots beside it correct what it gets wrong; the rest stays frozen:

    FFN′(H) = FFN(H) + act(H K̃ᵀ) Ṽ                                                                        (eq. 5)

with the MLP's own input H and activation. The slots learn the edits in all paraphrases that are at hand. Nothing
routes: every text passes through them, so that other facts stay only as far as the keys do not answer to them. Random
keys that are trained, as in the paper, answer to everything. Here each prompt has a slot, whose key tells the input h
at the end of the prompt from what other facts put there, and stays:

    k̃ = 3 C⁻¹h / hᵀC⁻¹h,   C = E[h′h′ᵀ] over the tokens of other facts

Before, a score says whether the model knows a fact at all: how much likelier the answer is behind the prompt and its
paraphrases than behind prompts of other relations about the same subject,

    CKA(s, r, o) = (mean over r of P(o | s, r) + α) / (mean over r′ of P(o | s, r′) + α)                      (eq. 2)

below 1, it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from reknow.checks.bounds import NonNegative, Number, Rate
from reknow.datasets.facts import load_facts
from reknow.editing.descent import adam_update
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.files.schema import Strict
from reknow.lm import LM
from reknow.memories.base import SideModuleMethod, memory_patch, paraphrases, prepare, train_beside
from reknow.memories.distances import prompt_inputs, prompt_states
from reknow.memories.slots import Slots, merge, slot_hooks
from reknow.model.exact import exact
from reknow.model.tokens import Text
from reknow.patching.memory import Hooks
from reknow.patching.patches import Patch
from reknow.patching.state_spec import StateSpec

_OTHERS = "known_1000", 128
"""Facts that the slots shall not answer to: bundled set, how many."""
_SLOT_INPUT, _RIDGE = 3.0, 0.01
"""Input of a slot at its own fact, where the activation is nearly linear; added to the moment of the other facts'
inputs, as a share of its mean diagonal."""
_CONTRASTS = 4
"""Prompts of other relations that the score compares with."""


class VersionFields(Strict):
    """What a version knows besides its tensors: names of the MLP's input and output module, and of its activation."""

    reader: str
    writer: str
    activation: str


@dataclass(frozen=True)
class CaliNet(SideModuleMethod):
    """Slots beside an MLP, trained on the edits in all their paraphrases."""

    depth: ClassVar[float] = 0.6
    """Deep in the model, as in the paper, but with layers above that later tokens of an answer can read."""
    state_spec: ClassVar[StateSpec] = StateSpec(
        {"keys": "float32 slots in", "values": "float32 slots out"}, VersionFields
    )

    trained_keys: bool = False
    """Whether keys start at random and are trained with the values, as in the paper."""
    slots: Number | None = None
    """Trained keys of one call; None: four per edit (64 to 256 for 10 to 1,000 facts in the paper)."""
    steps: Number = 200
    learning_rate: Rate = 0.06
    """Learning rate of Adam: of values in root mean squares of the MLP's output, of trained keys in units in which a
    step moves a slot's input by this much."""
    smoothing: NonNegative = 1e-3
    """α of the score, a probability."""

    @property
    def name(self) -> str:
        return "calinet"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        if self.slots is not None and not self.trained_keys:
            raise InputError(
                f"expected slots with trained_keys; got {self.slots} slots, where every paraphrase has one: set "
                "trained_keys, or leave slots out"
            )
        edits, layer, _, stored, notes = prepare(self, lm, edits)
        rows = lm.encode([Text.asked(edit, text) for edit in edits for text in paraphrases(edit)])
        inputs, _ = prompt_states(lm, rows, lm.mlp_in(layer)[0])  # (rows, hidden)
        _, outputs = prompt_states(lm, rows, lm.parts.value[layer])
        notes["assessment"] = [
            [
                assess_knowledge(lm, edit, answer, self.smoothing)
                for answer in (edit.target_new, edit.target_true)
                if answer is not None
            ]
            for edit in edits
        ]
        length, size = float(inputs.norm(dim=1).mean()), float(outputs.square().mean().sqrt())
        if self.trained_keys:
            generator, count = torch.Generator().manual_seed(self.seed), self.slots or 4 * len(edits)
            keys = (torch.randn(count, inputs.shape[1], generator=generator) / length).to(inputs).requires_grad_()
        else:
            keys = fact_keys(inputs, other_inputs(lm, layer))
        values = outputs.new_zeros(len(keys), outputs.shape[1], requires_grad=True)
        groups = [{"params": [values], "lr": self.learning_rate * size}]
        if self.trained_keys:
            groups.append({"params": [keys], "lr": self.learning_rate / length})
        slots = Slots.beside(lm, layer, keys, values)
        hooks = slot_hooks([*(Slots.read(lm, patch) for patch in stored), slots])
        update = adam_update(torch.optim.Adam(groups))
        passes = train_beside(self, lm, hooks, rows, layer, update, lambda losses: losses.mean() < self.stop_loss)
        notes["losses"] = [fmean(losses) for losses in passes]
        state = {"keys": keys.detach(), "values": values.detach()}
        return memory_patch(self, lm, edits, state, memory=slots.memory, notes=notes)

    @staticmethod
    def running_memory(lm: LM, patches: Sequence[Patch]) -> Hooks:
        return slot_hooks(merge([Slots.read(lm, patch) for patch in patches]))


def other_inputs(lm: LM, layer: int) -> Tensor:
    """What the tokens of bundled facts put into the MLP of that layer, in the base model. (tokens, hidden)"""

    def measure() -> Tensor:
        name, count = _OTHERS
        rows = lm.encode([Text(fact.text) for fact in load_facts(name)[:count]])
        with lm.unpatched():
            states, real = prompt_inputs(lm, rows, lm.mlp_in(layer)[0])
        return states[real]

    return lm.cached(("calinet", layer), measure)


def fact_keys(inputs: Tensor, others: Tensor) -> Tensor:
    """Keys that answer to their own input and as little as can be to the others'. (facts, hidden)

    Args:
        inputs: (facts, hidden).
        others: (tokens, hidden).
    """
    seen, own = exact(others), exact(inputs)
    moment = seen.T @ seen / len(seen)
    moment.diagonal().add_(_RIDGE * moment.diagonal().mean())
    keys = torch.linalg.solve(moment, own.T).T
    return (_SLOT_INPUT * keys / (own * keys).sum(1, keepdim=True)).to(inputs)


def assess_knowledge(lm: LM, edit: Edit, answer: str, smoothing: float) -> float | None:
    """The score of equation 2 for an answer; None for an edit without a subject, which has no other relations."""
    if edit.subject is None:
        return None
    others = dict.fromkeys(fact.prompt for fact in load_facts("counterfact") if fact.prompt != edit.prompt)
    own, contrasts = paraphrases(edit), [edit.fill(prompt) for prompt in others][:_CONTRASTS]
    prompts = [*own, *contrasts]
    scores = lm.score(prompts, [answer] * len(prompts), [edit.separator] * len(prompts))
    probabilities = [score.probability for score in scores]
    known, contrast = fmean(probabilities[: len(own)]), fmean(probabilities[len(own) :])
    return (known + smoothing) / (contrast + smoothing)
