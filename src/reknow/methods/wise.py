"""WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models. Wang et al. 2024,
arXiv 2405.14768.

A copy of one value matrix, the side memory W′ = W + Δ, learns the edits; W stays. Which of the two a prompt takes is
read off the activations: edits are trained to move them far, unrelated text to leave them, so that the distance

    d(x) = ‖x (W′ − W)ᵀ‖,   mean over the prompt's tokens                                                 (eq. 3)

routes a prompt to the side memory when it exceeds a share of the smallest distance that any edit reached:

    L = −log P(answer) + [d(out) − α]₊ + [β − d(in)]₊ + [γ − d(in) + d(out)]₊                             (eq. 4, 5)

where `out` are other facts. Edits go in shards, each of which may change a random part ρ of the weights. The shards
are merged by TIES (Yadav et al. 2023, arXiv 2306.01708), or kept as memories of their own of which the most active
answers (WISE-Retrieve).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reknow.checks.bounds import Formerly, NonNegative, Number, Part, Rate, Units
from reknow.datasets.facts import load_facts
from reknow.editing.contexts import general_contexts
from reknow.edits import Edit
from reknow.files.schema import Strict
from reknow.lm import LM
from reknow.memories.base import SideModuleMethod, memory_patch, prepare, train_beside
from reknow.memories.distances import prompt_inputs
from reknow.memories.side_memory import Shard, ShardDescent, SideMemory, distance, divide, read_shards, ties
from reknow.model.scored_tokens import AnswerLoss
from reknow.model.tokens import Text
from reknow.patching.memory import Hooks
from reknow.patching.patches import Patch
from reknow.patching.state_spec import StateSpec, check_matrix
from reknow.texts.writing import prepend

_FACTS = "known_1000"
"""What an edit must leave alone: these ask like edits do. Against plain text more other facts change too."""


class VersionFields(Strict):
    """What a version knows besides its tensors."""

    modules: list[str] = Field(min_length=1, max_length=1)
    threshold: float
    density: float = Field(gt=0, le=1)
    retrieve: bool
    shard_size: int = Field(ge=1, lt=2**31)


@dataclass(frozen=True)
class WISE(SideModuleMethod):
    """A side memory beside one value matrix, and routing by activation."""

    for_all = ("units", "shard_size")  # by the size an edit's number tells its shard
    depth: ClassVar[float] = 0.85
    """The papers' layer as a share of the depth: 27 of 32 (Llama-2)."""
    state_spec: ClassVar[StateSpec] = StateSpec(
        {"distances": "float32 edits", "mask.*": "uint8 bytes.*", "delta.*": "float32 weights.*"},
        VersionFields,
        alike=("modules", "shard_size"),
    )

    steps: Number = 70
    learning_rate: Rate = 0.3
    """How far the first step of gradient descent moves the weights, in units of their root mean square."""
    clamp: Rate = 50.0
    """Largest change of a weight, in units of their root mean square."""
    alpha: NonNegative = 0.25
    """Margin α: how far unrelated text may move, in units of the length of the matrix's output."""
    beta: NonNegative = 1.0
    """Margin β: how far an edit's prompt must move, in units of the length of the matrix's output."""
    gamma: NonNegative = 0.5
    """Margin γ: how much farther an edit's prompt must move than unrelated text, in units of the length of the
    matrix's output."""
    threshold: NonNegative = 0.6
    """A prompt is routed when it moves farther than this share of the least that any edit moved (the paper: 0.88)."""
    units: Units = "relative"
    """`absolute`: learning rate, clamp and margins are plain numbers (in the paper 1, 1, 5, 20, 10)."""
    mask_ratio: Annotated[Part | None, Formerly("mask")] = None
    """Share ρ of the weights that a shard may change, from the next one that is begun; None: what leaves an edit
    18,000 weights, 0.2 at least."""
    shard_size: Number | None = None
    """Edits per shard; None: those for which a fifth of the weights is enough, 10 at least."""
    density: Part = 0.53
    """Share of each shard's largest changes that TIES keeps."""
    retrieve: bool = False
    """WISE-Retrieve: every shard is a memory of its own, and the one that a prompt moves most answers."""
    context_groups: tuple[tuple[Number, Number], ...] = ((2, 5), (2, 10))
    """(how many, of how many tokens) texts to put before the prompt."""
    context_source: Literal["text", "model"] = "text"
    """Where these texts come from: `text`: they are beginnings of general text; `model`: the model writes them, as in
    the paper, some models nonsense."""
    unrelated_facts: Annotated[Number, Formerly("unrelated", also={"context_source": "model"})] = 16
    """Bundled facts about other subjects that must not move, other ones for every edit."""

    @property
    def name(self) -> str:
        return "wise-retrieve" if self.retrieve else "wise"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, layer, modules, stored, notes = prepare(self, lm, edits)
        shape, known = lm.weight(modules[0]).shape, sum(len(patch.edits) for patch in stored)
        before = stored[-1].memory["shard_size"] if stored else None
        size, share = divide(shape.numel(), self.shard_size or before, self.mask_ratio)
        shards = read_shards(stored, shape)
        state: dict[str, Tensor] = {}
        distances, notes["losses"] = [], []
        for number, edit in lm.progress.each("edits", [*enumerate(edits, known)]):
            index = number // size
            if index not in shards:
                shards[index] = Shard.new(shape, share, self.seed + index)
                state[f"mask.{index}"] = shards[index].packed_mask()
            shard = shards[index]
            change, reached, losses = self._train(lm, edit, layer, shard, number)
            shard.change += change
            state[f"delta.{index}"] = state.get(f"delta.{index}", 0) + change[shard.mask]
            distances.append(reached)
            notes["losses"].append(losses)
        state["distances"] = torch.tensor(distances)
        memory = {"modules": modules, "threshold": self.threshold, "density": self.density}
        memory |= {"retrieve": self.retrieve, "shard_size": size}
        return memory_patch(self, lm, edits, state, memory=memory, notes=notes)

    def _train(self, lm: LM, edit: Edit, layer: int, shard: Shard, number: int) -> tuple[Tensor, float, list[float]]:
        """How the edit changes the shard (out, in), the distance that its prompts reach, and the losses."""
        module = lm.parts.value[layer]
        device = lm.device_of(module)
        weight, before = lm.weight(module).float(), shard.change.to(device)
        rows = lm.encode([Text.asked(edit, prepend(prefix, edit.text)) for prefix in self.contexts(lm)])
        others = lm.encode([Text(text) for text in self._unrelated(edit, number)])
        delta = before.clone().requires_grad_()
        hooks = Hooks({module: lambda _, inputs, outputs: outputs + inputs.float() @ delta.T})
        inside, outside = (prompt_inputs(lm, texts, module) for texts in (rows, others))
        relative = self.units == "relative"
        size = float(weight.square().mean().sqrt()) if relative else 1.0
        length = float((inside[0] @ weight.T).norm(dim=-1)[inside[1]].mean()) if relative else 1.0

        def loss(answers: AnswerLoss) -> Tensor:  # (1,)
            near, far = (distance(*states, delta) / length for states in (inside, outside))
            margins = margin_loss(near, far, self.alpha, self.beta, self.gamma)
            return (answers.nll().mean() + margins.to(lm.device))[None]

        mask, rate, clamp = shard.mask.to(device), self.learning_rate * size, self.clamp * size
        update = ShardDescent(delta, mask, rate, clamp, relative=relative)
        passes = train_beside(self, lm, hooks, rows, layer, update, lambda losses: losses < self.stop_loss, loss)
        delta = delta.detach()
        return (delta - before).cpu(), float(distance(*inside, delta).mean()), [loss for (loss,) in passes]

    def contexts(self, lm: LM) -> tuple[str, ...]:
        """The texts to put before the prompt; the first is empty."""
        return general_contexts(lm, self.context_groups, self.context_source, seed=self.seed)

    def _unrelated(self, edit: Edit, number: int) -> list[str]:
        """Facts about other subjects than the edit's, drawn for edit number `number`."""
        texts = [fact.text for fact in load_facts(_FACTS) if edit.subject is None or edit.subject not in fact.text]
        generator = torch.Generator().manual_seed(self.seed + number)
        return [texts[i] for i in torch.randperm(len(texts), generator=generator)[: self.unrelated_facts].tolist()]

    @staticmethod
    def running_memory(lm: LM, patches: Sequence[Patch]) -> SideMemory:
        memory = patches[-1].memory
        (module,) = memory["modules"]
        check_matrix(lm, module, {})
        shards = read_shards(patches, lm.weight(module).shape)
        deltas = [shards[index].change for index in sorted(shards)]
        reached = torch.cat([patch.state["distances"] for patch in patches])
        least = [distances.min() for distances in reached.split(memory["shard_size"])]
        if not memory["retrieve"]:
            deltas, least = [ties(deltas, memory["density"])], [reached.min()]
        parts = torch.stack(deltas), memory["threshold"] * torch.stack(least)
        return SideMemory(module, *(part.to(lm.device_of(module)) for part in parts))


def margin_loss(near: Tensor, far: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """Equation 4: distances of edits (rows,) and of unrelated text (pieces,); each term over what violates it."""
    gaps = (far[:, None] - near + gamma, far - alpha, beta - near)
    return sum((gap.clamp(min=0).sum() / (gap > 0).sum().clamp(min=1) for gap in gaps), torch.zeros_like(near[0]))
