"""KN: Knowledge Neurons in Pretrained Transformers. Dai, Dong, Hao, Sui, Chang, Wei 2021, arXiv 2104.08696.

The inputs a_i of a value matrix are neurons, its columns (slots) are what each adds. The neurons that express a fact
are those through which the probability of the old answer flows, by integrated gradients from nothing to the neuron's
own activation:

    Attr_i = a_i/m · Σ_{k<m} ∂P(answer | a scaled by k/(m−1)) / ∂a_i                                          (eq. 4)

Those above a share of the largest attribution, in most paraphrases of the fact, are the knowledge neurons. To change
the fact, the old answer's embedding is taken from their slots and the new answer's is added; to erase it, the slots
are set to 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reknow.checks.bounds import Formerly, NonNegative, Number, Share
from reknow.contract import Method, check_edits, make_patch
from reknow.editing.sequence import edit_sequentially
from reknow.edits import Edit
from reknow.errors import EditFailed, EditRefused, ModelError
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.replay import BlockReplay
from reknow.model.tokens import EncodedText, Text
from reknow.patching.deltas import Delta, LowRank
from reknow.patching.patches import Patch
from reknow.tracing.causal import MOST_ANSWER_TOKENS, PARTIAL_CHARACTER

_Neuron = tuple[int, int]
"""(layer, index among the inputs of its value matrix)."""


@dataclass(frozen=True)
class KN(Method):
    """Editing or erasing the slots of a fact's knowledge neurons, one fact after the other."""

    needs_knowledge: ClassVar[bool] = True

    erase: bool = False
    """Set the slots to 0 instead of moving them from the old answer to the new."""
    steps: Number = 20
    """Points of the integral, from no activation to the neuron's own."""
    threshold: Share = 0.2
    """Attribution that a neuron needs, as a share of the largest one."""
    prompt_share: Annotated[Share, Formerly("share")] = 0.7
    """Share of the prompts (the edit's own and its paraphrases) for which a neuron must have that attribution."""
    old_weight: NonNegative = 0.04
    """How much of the old answer's embedding is taken from a slot (λ₁; 1 in the paper)."""
    new_weight: NonNegative = 0.3
    """How much of the new answer's embedding is added to a slot (λ₂; 8 in the paper)."""
    normalize: Annotated[bool, Formerly("scaled")] = True
    """Embeddings are brought to the norm of the slot first, as in the paper, so that the weights mean the same in any
    model."""
    flip_negative: Annotated[bool, Formerly("signed")] = True
    """Turn the change round for a neuron that is negative on the prompt, as half of a gated MLP's are."""

    @property
    def name(self) -> str:
        return "kn-erase" if self.erase else "kn"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits, lm)
        return edit_sequentially(lm, edits, lambda edit: self._edit_one(lm, edit))

    def _edit_one(self, lm: LM, edit: Edit) -> Patch:
        old = edit.target_true or model_answer(lm, edit.text)
        if not old:
            raise EditRefused(
                f"kn looks for the neurons of the old answer; {edit.text!r} has none and the model says nothing: "
                "give target_true",
                edit,
            )
        prompts = [edit.text, *(edit.fill(paraphrase) for paraphrase in edit.rephrasings)]
        asked = lm.progress.each("reading prompts", prompts, parts=1)
        scores = [attribute_neurons(lm, prompt, old, self.steps, edit.separator) for prompt in asked]
        neurons = select_neurons(scores, self.threshold, self.prompt_share)
        if not neurons:
            raise EditFailed(
                f"expected neurons that {len(prompts)} prompts of {edit.text!r} share; got none: "
                "lower prompt_share or threshold",
                edit,
            )
        deltas: dict[str, Delta] = {}
        for layer in sorted({layer for layer, _ in neurons}):
            name = lm.parts.value[layer]
            weight = lm.weight(name)  # (out, in)
            indices = torch.tensor([i for at, i in neurons if at == layer], device=weight.device)
            slots = exact(weight[:, indices])  # (out, neurons)
            change = -slots if self.erase else self._shift(lm, edit, old, slots)
            if self.flip_negative and not self.erase:
                (row,) = lm.encode([Text(edit.text)])
                activation = lm.read([row], [len(row.ids) - 1], inputs=[name]).inputs[name][0]  # (in,)
                change *= activation[indices].sign().to(change)
            rows = torch.nn.functional.one_hot(indices, weight.shape[1]).float()  # (neurons, in)
            deltas[name] = LowRank(change.float(), rows.to(change.device))
        notes = {"neurons": [list(neuron) for neuron in neurons], "old_answer": old}
        return make_patch(self, lm, [edit], deltas, notes=notes)

    def _shift(self, lm: LM, edit: Edit, old: str, slots: Tensor) -> Tensor:
        """− λ₁ e_old + λ₂ e_new for every slot. slots and result: (out, neurons)"""
        table = lm.unembedding  # (vocabulary, features)
        if table.shape[1] != len(slots):
            raise ModelError(
                f"expected answer embeddings of {len(slots)} numbers, to add to the slots; got {table.shape[1]}: "
                "use kn-erase, or another method"
            )
        change = torch.zeros_like(slots)
        for weight, answer in ((-self.old_weight, old), (self.new_weight, edit.target_new)):
            (row,) = lm.encode([Text(edit.text, answer, separator=edit.separator)])
            embedding = exact(table[list(row.target_ids)].sum(0)).to(slots.device)  # (out,)
            size = slots.norm(dim=0) / embedding.norm() if self.normalize else torch.ones_like(slots[0])
            change += weight * embedding[:, None] * size
        return change


def select_neurons(scores: Sequence[Tensor], threshold: float, prompt_share: float) -> list[_Neuron]:
    """Neurons above the threshold for more than the share of prompts. scores: of each prompt, (layers, in)"""
    counts: Counter[_Neuron] = Counter()
    for attribution in scores:
        above = (attribution > threshold * attribution.max()).nonzero().tolist()
        counts.update((layer, i) for layer, i in above)
    return sorted(neuron for neuron, count in counts.items() if count > prompt_share * len(scores))


def model_answer(lm: LM, prompt: str) -> str:
    """What the model says in three tokens, and what is left of a number or a character in which they end."""
    said = lm.generate([prompt], 3)[0]
    known = said.rstrip(PARTIAL_CHARACTER)
    if known == said and not said[-1:].isdigit():
        return said.strip()
    left = lm.generate([prompt], MOST_ANSWER_TOKENS)[0][len(known) :]
    more = len(left) - len(left.lstrip("0123456789")) if known == said else 1
    return (known + left[:more]).strip()


def attribute_neurons(lm: LM, prompt: str, answer: str, steps: int, separator: str | None = None) -> Tensor:
    """Integrated gradients of the answer's probability by every neuron, mean over the answer's tokens. (layers, in)

    Each token is read behind the true ones before it, at the position that predicts it.
    """
    (row,) = lm.encode([Text(prompt, answer, separator=separator)])
    ends = range(row.prompt_length, len(row.ids))
    rows = [EncodedText(row.ids[:end], end) for end in ends for _ in range(steps)]
    batch = lm.pad(rows)
    column = batch.ids.shape[1] - 1
    here = torch.arange(len(rows), device=lm.device)
    targets = torch.tensor([row.ids[end] for end in ends for _ in range(steps)], device=lm.device)
    scale = torch.linspace(0, 1, steps, device=lm.device).repeat(len(ends))[:, None]  # (rows, 1)
    found = []
    for layer in lm.progress.each("integrating gradients", range(lm.layers), unit="layers", parts=1):
        replay = BlockReplay(lm, batch, layer, column)
        weight = lm.weight(lm.parts.value[layer]).float()  # (out, in)
        key = replay.key.float()  # (rows, in)
        with torch.enable_grad():
            # Scaling the neurons moves the value matrix's output by W (scale − 1) a.
            delta = ((scale.to(key.device) - 1) * key @ weight.T).requires_grad_()
            logits = replay(delta, here, torch.full_like(here, column)).float()
            probability = logits.softmax(-1).gather(1, targets[:, None]).sum()
            (gradient,) = torch.autograd.grad(probability, delta)  # (rows, out)
        found.append((key * (gradient @ weight)).mean(0).to(lm.device))
    # Layers of experts and dense ones may be of unlike width.
    return pad_sequence(found, batch_first=True, padding_value=-torch.inf)
