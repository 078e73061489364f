"""MEMOIR: Lifelong Model Editing with Minimal Overwrite and Informed Retention for LLMs. Wang et al. 2025,
arXiv 2506.07899.

A matrix of zeros, the residual memory W_m, stands beside one value matrix W. A prompt with inputs a has a mask of k
of its columns, and an edit trains the columns in its own mask alone:

    out = W x + W_m (M(a) ⊙ x),     M(a) = π(T_k(ā − ā₀))

where ā is the mean of a over the prompt's tokens, ā₀ the same of other prompts, T_k marks the k entries with the
largest absolute values and π is a fixed permutation, so that edits spread over all columns. Like prompts have like
masks: a question takes the mask of the edit whose mask shares most with its own, and no memory at all where that is
less than τ of the k columns:

    R = |M(a) ∧ M(a_match)| / k;   R = 1: the edit;   τ ≤ R < 1: rephrased;   R < τ: irrelevant
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reknow.checks.bounds import Number, Rate, Share, Units
from reknow.datasets.facts import load_facts
from reknow.editing.contexts import general_contexts
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.files.schema import Strict
from reknow.lm import LM
from reknow.memories.base import SideModuleMethod, memory_patch, prepare, train_beside
from reknow.memories.distances import prompt_inputs
from reknow.memories.residual_memory import (
    ClippedDescent,
    ResidualMemory,
    TopHash,
    mean_inputs,
    pack_masks,
    read_memory,
)
from reknow.model.scored_tokens import AnswerLoss
from reknow.model.tokens import Text
from reknow.patching.memory import Hooks
from reknow.patching.patches import Patch
from reknow.patching.state_spec import StateSpec, check_matrix
from reknow.texts.writing import prepend

_FACTS = "known_1000"
"""Prompts of other facts, whose mean input is ā₀."""
_SHARE = 4096 / 14336
"""The paper's k of Llama 3's inputs."""


class VersionFields(Strict):
    """What a version knows besides its tensors."""

    modules: list[str] = Field(min_length=1, max_length=1)
    threshold: float = Field(ge=0, le=1)
    top_k: int = Field(ge=1, lt=2**31)
    seed: int = Field(ge=0, lt=2**63)


@dataclass(frozen=True)
class MEMOIR(SideModuleMethod):
    """A residual memory beside one value matrix, a mask of its columns for each edit."""

    name: ClassVar[str] = "memoir"
    for_all = ("units", "top_k", "seed")
    depth: ClassVar[float] = 0.1
    """Where masks told paraphrases best apart; the paper's layer is at 0.85 of the depth, 27 of 32 (Llama 3)."""
    state_spec: ClassVar[StateSpec] = StateSpec(
        {"masks": "uint8 edits bytes", "delta": "float32 out columns", "background": "float32 in"},
        VersionFields,
        alike=("modules", "seed", "background"),
    )

    steps: Number = 30
    top_k: Number | None = None
    """Columns k in a mask; None: two sevenths of them, as the paper's 4,096 of Llama 3's 14,336."""
    threshold: Share = 0.4
    """τ: share of a mask's columns that the nearest stored mask must have too, or the memory says nothing."""
    learning_rate: Rate = 0.3
    """How far the first step of gradient descent moves the mask's columns, in units of the root mean square of W."""
    longest_gradient: Rate = 1.0
    """A longer gradient is shortened to this, in lengths of the first one."""
    units: Units = "relative"
    """`absolute`: learning rate and longest gradient are plain numbers (both 1 in the paper)."""
    background_facts: Number = 100
    """Bundled facts whose prompts' mean input ā₀ is."""
    context_groups: tuple[tuple[Number, Number], ...] = ((5, 5), (5, 10))
    """(how many, of how many tokens) texts to put before the prompt; the mask is always the bare prompt's."""
    context_source: Literal["text", "model"] = "text"
    """Where these texts come from: `text`: they are beginnings of general text; `model`: the model writes them, as in
    the authors' code."""

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, layer, modules, stored, notes = prepare(self, lm, edits)
        module, shape = modules[0], lm.weight(modules[0]).shape
        device = lm.device_of(module)
        hashed = self._hash(lm, layer, stored)
        weight, _ = read_memory(stored, shape) if stored else (torch.zeros(*shape), None)
        weight = weight.to(device)
        before, masks, notes["losses"] = weight.clone(), [], []
        for edit in lm.progress.each("edits", edits):
            mask = hashed.masks(*prompt_inputs(lm, lm.encode([Text.asked(edit)]), module))[0]
            columns = mask.nonzero()[:, 0]
            weight[:, columns], losses = self._train(lm, edit, layer, columns, weight[:, columns])
            masks.append(mask)
            notes["losses"].append(losses)
        changed = torch.stack(masks).any(0)
        state = {"masks": pack_masks(torch.stack(masks)), "delta": (weight - before)[:, changed]}
        state["background"] = hashed.background
        memory = {"modules": modules, "threshold": self.threshold, "top_k": hashed.kept, "seed": self.seed}
        return memory_patch(self, lm, edits, state, memory=memory, notes=notes)

    def _hash(self, lm: LM, layer: int, stored: Sequence[Patch]) -> TopHash:
        """How this memory makes its masks; those stored were made so too."""
        width = lm.weight(lm.parts.value[layer]).shape[1]
        kept = self.top_k or (stored[-1].memory["top_k"] if stored else max(1, round(_SHARE * width)))
        if kept > width:
            raise InputError(f"expected top_k of at most the {width} inputs of the matrix; got {kept}: lower it")
        if stored:
            background = stored[-1].state["background"].to(lm.device_of(lm.parts.value[layer]))
        else:
            background = self._background(lm, layer)
        return TopHash.of(background, kept, self.seed)

    def _background(self, lm: LM, layer: int) -> Tensor:
        """ā₀ in the unedited model. (in,)"""

        def measure() -> Tensor:
            facts = load_facts(_FACTS)
            drawn = torch.randperm(len(facts), generator=torch.Generator().manual_seed(self.seed))
            texts = [Text(facts[i].text) for i in drawn[: self.background_facts].tolist()]
            with lm.unpatched():
                inputs = prompt_inputs(lm, lm.encode(texts), lm.parts.value[layer])
            return mean_inputs(*inputs).mean(0)

        return lm.cached(("memoir's background", layer, self.background_facts, self.seed), measure)

    def _train(self, lm: LM, edit: Edit, layer: int, columns: Tensor, before: Tensor) -> tuple[Tensor, list[float]]:
        """The mask's columns of W_m (out, k) when the edit is learned, and the losses."""
        module = lm.parts.value[layer]
        contexts = general_contexts(lm, self.context_groups, self.context_source, seed=self.seed)
        rows = lm.encode([Text.asked(edit, prepend(prefix, edit.text)) for prefix in contexts])
        values = before.clone().requires_grad_()
        hooks = Hooks({module: lambda _, inputs, outputs: outputs + inputs[..., columns].float() @ values.T})
        unit = float(lm.weight(module).float().square().mean().sqrt()) if self.units == "relative" else None
        update = ClippedDescent(values, self.learning_rate, self.longest_gradient, unit)

        def loss(answers: AnswerLoss) -> Tensor:  # (1,)
            return answers.nll().mean()[None]

        passes = train_beside(self, lm, hooks, rows, layer, update, lambda losses: losses < self.stop_loss, loss)
        return values.detach(), [loss for (loss,) in passes]

    @staticmethod
    def running_memory(lm: LM, patches: Sequence[Patch]) -> ResidualMemory:
        newest = patches[-1]
        (module,), memory = newest.memory["modules"], newest.memory
        check_matrix(lm, module, {"in": (newest.state["background"], 0), "out": (newest.state["delta"], 0)})
        device = lm.device_of(module)
        weight, stored = (part.to(device) for part in read_memory(patches, lm.weight(module).shape))
        hashed = TopHash.of(newest.state["background"].to(device), memory["top_k"], memory["seed"])
        return ResidualMemory(module, weight, stored, hashed, memory["threshold"])
