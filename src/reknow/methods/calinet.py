"""CaliNet: Calibrating Factual Knowledge in Pretrained Language Models. Dong et al. 2022, arXiv 2210.03329.

An MLP is a memory of keys and values. Some more slots beside it correct what it gets wrong; the rest stays frozen:

    FFN′(H) = FFN(H) + act(H K̃ᵀ) Ṽ                                                                        (eq. 5)

with the MLP's own input H and activation. The slots learn the edits in all wordings that are at hand. Nothing routes:
every text passes through them, so that other facts stay only as far as the keys do not answer to them. Random keys
that are trained, as in the paper, answer to everything. Here each wording has a slot, whose key tells the input h at
the end of the prompt from what other facts put there, and stays:

    k̃ = 3 C⁻¹h / hᵀC⁻¹h,   C = E[h′h′ᵀ] over the tokens of other facts

Before, a score says whether the model knows a fact at all: how much likelier the answer is behind the prompt and its
rewordings than behind prompts of other relations about the same subject,

    CKA(s, r, o) = (mean over r of P(o | s, r) + α) / (mean over r′ of P(o | s, r′) + α)                      (eq. 2)

below 1, it does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from reknow.checks.bounds import Number, Rate, Seed, Weight
from reknow.contract import check_edits
from reknow.datasets.facts import load_facts
from reknow.editing.descent import adam_update, descend
from reknow.edits import Edit
from reknow.errors import PatchError
from reknow.files.schema import Strict
from reknow.memories.base import SideModuleMethod, conflicts, memory_patch, resolve_conflicts
from reknow.memories.distances import prompt_inputs, prompt_states
from reknow.model.exact import exact
from reknow.model.forward_context import ForwardContext
from reknow.model.scored_tokens import AnswerLoss
from reknow.model.tokens import Text
from reknow.patching.memory import Hooks, versions
from reknow.patching.patches import Patch
from reknow.patching.state_spec import StateSpec, check_matrix

if TYPE_CHECKING:
    from reknow.lm import LM

DEPTH = 0.6
"""Deep in the model, as in the paper, but with layers above that later tokens of an answer can read."""
OTHERS = "known_1000", 128
"""Facts that the slots shall not answer to: bundled set, how many."""
REACH, RIDGE = 3.0, 0.01
"""Input of a slot at its own fact, where the activation is nearly linear; added to the moment of the other facts'
inputs, as a share of its mean diagonal."""
CONTRASTS = 4
"""Prompts of other relations that the score compares with."""


class Memory(Strict):
    """What a version knows besides its tensors."""

    reader: str
    writer: str
    activation: str


@dataclass(frozen=True)
class CaliNet(SideModuleMethod):
    """Slots beside an MLP, trained on the edits in all their wordings."""

    depth: ClassVar[float] = DEPTH
    state_spec: ClassVar[StateSpec] = StateSpec({"keys": "float32 slots in", "values": "float32 slots out"}, Memory)

    trained_keys: bool = False
    """As in the paper: keys start at random and are trained with the values."""
    slots: Number | None = None
    """Trained keys of one call; None: four per edit (64 to 256 for 10 to 1,000 facts in the paper)."""
    steps: Number = 200
    """Updates at most."""
    learning_rate: Rate = 0.06
    """Of Adam: values in root mean squares of the MLP's output, trained keys in units in which a step moves a slot's
    input by this much."""
    stop_loss: Weight = 0.05
    """Finished when the mean loss (nats a token) is below."""
    smoothing: Weight = 1e-3
    """α of the score, a probability."""
    seed: Seed = 0
    """Of the slots at the start."""

    @property
    def name(self) -> str:
        return "calinet"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits)
        clashes = resolve_conflicts(self, conflicts(self, lm, edits))
        layer = self.chosen_layer(lm)
        texts = [Text.asked(edit, text) for edit in edits for text in wordings(edit)]
        rows = lm.encode(texts)
        reader, writer = lm.parts.mlp_in[layer][0], lm.parts.value[layer]
        inputs, _ = prompt_states(lm, rows, reader)  # (rows, hidden)
        _, outputs = prompt_states(lm, rows, writer)
        assessed = [[assessment(lm, edit, answer, self.smoothing) for answer in _answers(edit)] for edit in edits]
        length, size = float(inputs.norm(dim=1).mean()), float(outputs.square().mean().sqrt())
        if self.trained_keys:
            generator, count = torch.Generator().manual_seed(self.seed), self.slots or 4 * len(edits)
            keys = (torch.randn(count, inputs.shape[1], generator=generator) / length).to(inputs).requires_grad_()
        else:
            keys = own_keys(inputs, other_inputs(lm, reader))
        values = outputs.new_zeros(len(keys), outputs.shape[1], requires_grad=True)
        groups = [{"params": [values], "lr": self.learning_rate * size}]
        if self.trained_keys:
            groups.append({"params": [keys], "lr": self.learning_rate / length})
        optimizer = torch.optim.Adam(groups)
        before = [Slots.of(patch).to(lm.device) for patch in versions(lm.patches, self.name)]
        trial = beside([*before, Slots(reader, writer, activation(lm), keys, values)])
        with lm.temporary_memory(self.name, trial), torch.enable_grad():
            answers = AnswerLoss(lm, rows, layer)
            passes = descend(
                [answers.nll], adam_update(optimizer), self.steps, lambda losses: losses.mean() < self.stop_loss
            )
        state = {"keys": keys.detach(), "values": values.detach()}
        about = {"reader": reader, "writer": writer, "activation": activation(lm)}
        losses = [fmean(losses) for losses in passes]
        notes = {"layer": layer, "losses": losses, "conflicts": clashes, "assessment": assessed}
        return memory_patch(self, lm, edits, state, memory=about, notes=notes)

    @staticmethod
    def memory(lm: LM, patches: Sequence[Patch]) -> Hooks:
        slots = [Slots.of(patch).to(lm.device) for patch in patches]
        for one in slots:
            check_matrix(lm, one.writer, {"out": (one.values, 1)})
            own = lm.parts.mlp_in[lm.parts.value.index(one.writer)][0], activation(lm)
            if (one.reader, one.activation) != own or one.keys.shape[1] != lm.weight(own[0]).shape[1]:
                raise PatchError(
                    f"expected slots that read {own[0]} through {own[1]}; got others at {one.reader!r}: load the "
                    "model on which they were made"
                )
        return beside(together(slots))


def wordings(edit: Edit) -> list[str]:
    """The edit's prompt and its rewordings, the subject filled in."""
    return [edit.text, *(edit.fill(wording) for wording in edit.rephrasings)]


def other_inputs(lm: LM, reader: str) -> Tensor:
    """What the tokens of bundled facts put into the module, in the base model. (tokens, hidden)"""

    def measure() -> Tensor:
        name, count = OTHERS
        rows = lm.encode([Text(fact.text) for fact in load_facts(name)[:count]])
        with lm.unpatched():
            states, real = prompt_inputs(lm, rows, reader)
        return states[real]

    return lm.cached(("calinet", reader), measure)


def own_keys(inputs: Tensor, others: Tensor) -> Tensor:
    """Keys that answer to their own input and as little as can be to the others'. (facts, hidden)

    Args:
        inputs: (facts, hidden).
        others: (tokens, hidden).
    """
    seen, own = exact(others), exact(inputs)
    moment = seen.T @ seen / len(seen)
    moment.diagonal().add_(RIDGE * moment.diagonal().mean())
    keys = torch.linalg.solve(moment, own.T).T
    return (REACH * keys / (own * keys).sum(1, keepdim=True)).to(inputs)


def activation(lm: LM) -> str:
    """The name of the activation in the model's MLPs, as its configuration gives it."""
    config = lm.model.config.get_text_config(decoder=True)
    names = (getattr(config, name, None) for name in ("hidden_activation", "hidden_act", "activation_function"))
    return next((name for name in names if isinstance(name, str) and name in ACT2FN), "gelu")


def assessment(lm: LM, edit: Edit, answer: str, smoothing: float) -> float | None:
    """The score of equation 2 for an answer; None for an edit without a subject, which has no other relations."""
    if edit.subject is None:
        return None
    others = dict.fromkeys(fact.prompt for fact in load_facts("counterfact") if fact.prompt != edit.prompt)
    contrasts = [edit.fill(prompt) for prompt in others][:CONTRASTS]
    prompts = [*wordings(edit), *contrasts]
    scores = lm.score(prompts, [answer] * len(prompts), [edit.separator] * len(prompts))
    found = [math.exp(-score.nll * len(score.hits)) for score in scores]
    known = len(prompts) - len(contrasts)
    return (fmean(found[:known]) + smoothing) / (fmean(found[known:]) + smoothing)


def _answers(edit: Edit) -> list[str]:
    """The answers that are assessed: the new one, and the old one where the edit names it."""
    return [answer for answer in (edit.target_new, edit.target_true) if answer is not None]


@dataclass(eq=False)
class Slots:
    """Keys and values beside one MLP."""

    reader: str
    """Module whose input is the MLP's."""
    writer: str
    """Module whose output is the MLP's."""
    activation: str
    keys: Tensor  # (slots, hidden)
    values: Tensor  # (slots, hidden)

    @classmethod
    def of(cls, patch: Patch) -> Slots:
        return cls(**patch.memory, keys=patch.state["keys"], values=patch.state["values"])

    def to(self, device) -> Slots:
        return Slots(self.reader, self.writer, self.activation, self.keys.to(device), self.values.to(device))


def together(slots: Sequence[Slots]) -> list[Slots]:
    """The same slots, those beside one MLP in one."""
    found: dict[tuple[str, str, str], list[Slots]] = {}
    for one in slots:
        found.setdefault((one.reader, one.writer, one.activation), []).append(one)
    return [
        Slots(*where, torch.cat([one.keys for one in group]), torch.cat([one.values for one in group]))
        for where, group in found.items()
    ]


def beside(slots: Sequence[Slots]) -> Hooks:
    """The hooks that run the slots."""
    read: dict[str, Tensor] = {}

    def keep(reader: str, _context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
        read[reader] = inputs
        return outputs

    def add(group: Sequence[Slots], _context: ForwardContext, _inputs: Tensor, outputs: Tensor) -> Tensor:
        for one in group:
            hidden = read[one.reader].to(one.keys.dtype)
            outputs = outputs + ACT2FN[one.activation](hidden @ one.keys.T) @ one.values
        return outputs

    groups = {one.writer: [each for each in slots if each.writer == one.writer] for one in slots}
    readers = {one.reader: partial(keep, one.reader) for one in slots}
    return Hooks(readers | {writer: partial(add, group) for writer, group in groups.items()})
