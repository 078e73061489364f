"""WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models. Wang et al. 2024,
arXiv 2405.14768.

A copy of one value matrix, the side memory W′ = W + Δ, learns the edits; W stays. What is asked tells by itself where
it belongs: edits are trained to move the activations far, unrelated text to leave them, so that the distance

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
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from reknow.checks.bounds import Formerly, Number, Part, Rate, Seed, Units, Weight
from reknow.datasets.facts import load_facts
from reknow.editing.contexts import sample_contexts
from reknow.edits import Edit
from reknow.errors import InputError, PatchError
from reknow.files.schema import Strict
from reknow.memories.base import SideModuleMethod, memory_patch, prepare
from reknow.memories.distances import prompt_inputs
from reknow.model.exact import finite_loss
from reknow.model.forward_context import ForwardContext
from reknow.model.scored_tokens import AnswerLoss
from reknow.model.tokens import Text
from reknow.patching.memory import Hooks, hook_output
from reknow.patching.patches import Patch
from reknow.patching.state_spec import StateSpec, check_matrix
from reknow.texts.writing import prepend

if TYPE_CHECKING:
    from reknow.lm import LM

FACTS = "known_1000"
"""What an edit must leave alone: these ask like edits do. Against plain text more of the neighbours come along."""
DEPTH = 0.85
"""The papers' layer as a share of the depth: 27 of 32 (Llama-2)."""
ROOM = 18_000
"""Weights of its part that a shard has for each edit: a fifth of Llama-2's 4096 × 11008 for 500 edits."""
SHARE, SHARD = 0.2, 10
"""The paper's ρ; a shard's fewest edits, where a matrix is so small that the part has to be larger."""


class Memory(Strict):
    """What a version knows besides its tensors."""

    modules: list[str] = Field(min_length=1, max_length=1)
    threshold: float
    density: float = Field(gt=0, le=1)
    retrieve: bool
    shard_size: int = Field(ge=1, lt=2**31)


@dataclass(frozen=True)
class WISE(SideModuleMethod):
    """A side memory beside one value matrix, and routing by activation."""

    depth: ClassVar[float] = DEPTH
    state_spec: ClassVar[StateSpec] = StateSpec(
        {"distances": "float32 edits", "mask.*": "uint8 bytes.*", "delta.*": "float32 weights.*"}, Memory
    )

    steps: Number = 70
    """Updates of one edit at most."""
    learning_rate: Rate = 0.3
    """Of gradient descent, such that the first step moves the weights by this many times their root mean square."""
    clamp: Weight = 50.0
    """Largest change of a weight, in units of their root mean square."""
    alpha: Weight = 0.25
    """Margin α: how far unrelated text may move, in units of the length of the matrix's output."""
    beta: Weight = 1.0
    """Margin β: how far an edit's prompt must move, in that unit."""
    gamma: Weight = 0.5
    """Margin γ: how much farther an edit's prompt must move than unrelated text, in that unit."""
    threshold: Weight = 0.6
    """A prompt is routed when it moves farther than this share of the least that any edit moved (the paper: 0.88)."""
    units: Units = "relative"
    """`absolute`: learning rate, clamp and margins are plain numbers (in the paper 1, 1, 5, 20, 10)."""
    stop_loss: Weight = 0.05
    """An edit is finished when its whole loss is below."""
    mask_ratio: Annotated[Part | None, Formerly("mask")] = None
    """Share ρ of the weights that a shard may change; None: what leaves an edit 18,000 weights, 0.2 at least."""
    shard_size: Number | None = None
    """Edits per shard; None: those for which a fifth of the weights is enough, 10 at least."""
    density: Part = 0.53
    """Share of each shard's largest changes that TIES keeps."""
    retrieve: bool = False
    """WISE-Retrieve: every shard is a memory of its own, and the one that a prompt moves most answers."""
    context_groups: tuple[tuple[Number, Number], ...] = ((2, 5), (2, 10))
    """(how many, of how many tokens) texts sampled from the model to put before the prompt."""
    unrelated_facts: Annotated[Number, Formerly("unrelated")] = 16
    """Bundled facts about other subjects that must not move, other ones for every edit."""
    seed: Seed = 0
    """Of the masks, contexts and facts."""

    @property
    def name(self) -> str:
        return "wise-retrieve" if self.retrieve else "wise"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, layer, modules, before, notes = prepare(self, lm, edits)
        shape, stored = lm.weight(modules[0]).shape, sum(len(patch.edits) for patch in before)
        shard_size, share = self._room(shape.numel(), before[-1].memory["shard_size"] if before else None)
        shards = _shards(before, shape)
        state: dict[str, Tensor] = {}
        distances, losses = [], []
        for number, edit in enumerate(edits, stored):
            index = number // shard_size
            if index not in shards:
                shards[index] = Shard.new(shape, share, self.seed + index)
                state[f"mask.{index}"] = shards[index].packed()
            shard = shards[index]
            change, distance, history = self._learn(lm, edit, layer, shard, number)
            shard.change += change
            state[f"delta.{index}"] = state.get(f"delta.{index}", 0) + change[shard.mask]
            distances.append(distance)
            losses.append(history)
        state["distances"] = torch.tensor(distances)
        memory = {"modules": modules, "threshold": self.threshold, "density": self.density}
        memory |= {"retrieve": self.retrieve, "shard_size": shard_size}
        return memory_patch(self, lm, edits, state, memory=memory, notes={**notes, "losses": losses})

    def _room(self, weights: int, stored: int | None = None) -> tuple[int, float]:
        """(edits of a shard, share of the weights that it may change) for a matrix of so many weights.

        Args:
            stored: edits of the memory's shards so far, which tell by an edit's number where it lies.

        Raises:
            InputError: others are asked for.
        """
        size = self.shard_size or stored or max(SHARD, int(SHARE * weights / ROOM))
        if stored not in (None, size):
            raise InputError(
                f"expected the shards that the memory was begun with; got shard_size {size}: set it to {stored}, or "
                "take the memory off first"
            )
        return size, self.mask_ratio or min(1.0, max(SHARE, size * ROOM / weights))

    def _learn(self, lm: LM, edit: Edit, layer: int, shard: Shard, number: int) -> tuple[Tensor, float, list[float]]:
        """How the edit changes the shard (out, in), the distance that its prompts reach, and the losses."""
        module, weight = lm.parts.value[layer], lm.weight(lm.parts.value[layer]).float()
        prefixes = sample_contexts(lm, self.context_groups, seed=self.seed)
        rows = lm.encode([Text.asked(edit, prepend(prefix, edit.text)) for prefix in prefixes])
        part, before = shard.mask.to(lm.device), shard.change.to(lm.device)
        delta = before.clone().requires_grad_()
        losses: list[float] = []
        with lm.temporary_memory(
            self.name, Hooks({module: lambda _, inputs, outputs: outputs + inputs.float() @ delta.T})
        ):
            inside = prompt_inputs(lm, rows, module)
            outside = prompt_inputs(lm, lm.encode([Text(text) for text in self._others(edit, number)]), module)
            size = float(weight.square().mean().sqrt())
            unit = 1.0 if self.units == "absolute" else float((inside[0] @ weight.T).norm(dim=-1)[inside[1]].mean())
            bound = self.clamp if self.units == "absolute" else self.clamp * size
            rate = self.learning_rate if self.units == "absolute" else None
            answers = AnswerLoss(lm, rows, layer)
            for _ in range(self.steps):
                with torch.enable_grad():
                    near, far = (distance(*states, delta) for states in (inside, outside))
                    margins = margin_loss(near / unit, far / unit, self.alpha, self.beta, self.gamma)
                    loss = answers.nll().mean() + margins
                    losses.append(finite_loss(loss))
                    if losses[-1] < self.stop_loss:
                        break
                    gradient = torch.autograd.grad(loss, delta)[0] * part
                with torch.no_grad():
                    if rate is None:
                        rate = self.learning_rate * size / max(float(gradient[part].square().mean().sqrt()), 1e-30)
                    delta -= rate * gradient
                    delta.clamp_(-bound, bound)
            reached = float(distance(*inside, delta.detach()).mean())
        return (delta.detach() - before).cpu(), reached, losses

    def _others(self, edit: Edit, number: int) -> list[str]:
        """Facts about other subjects than the edit's, drawn for edit number `number`."""
        texts = [fact.text for fact in load_facts(FACTS) if edit.subject is None or edit.subject not in fact.text]
        generator = torch.Generator().manual_seed(self.seed + number)
        return [texts[i] for i in torch.randperm(len(texts), generator=generator)[: self.unrelated_facts].tolist()]

    @staticmethod
    def memory(lm: LM, patches: Sequence[Patch]) -> SideMemory:
        about = patches[-1].memory
        (module,) = about["modules"]
        check_matrix(lm, module, {})
        shards = _shards(patches, lm.weight(module).shape)
        deltas = [shards[index].change for index in sorted(shards)]
        reached = torch.cat([patch.state["distances"] for patch in patches])
        least = [part.min() for part in reached.split(about["shard_size"])]
        if not about["retrieve"]:
            deltas, least = [ties(deltas, about["density"])], [reached.min()]
        thresholds = about["threshold"] * torch.stack(least)
        return SideMemory(module, torch.stack(deltas).to(lm.device), thresholds.to(lm.device))


@dataclass
class Shard:
    """Part of the weights, and how they changed."""

    mask: Tensor  # (out, in), boolean: the part
    change: Tensor  # (out, in), float32, 0 elsewhere

    @classmethod
    def new(cls, shape: Sequence[int], share: float, seed: int) -> Shard:
        """A random part of a matrix of this shape (out, in), nothing changed yet."""
        chosen = torch.rand(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed)) < share
        return cls(chosen.view(*shape), torch.zeros(*shape))

    def packed(self) -> Tensor:
        """The part as bits."""
        return torch.from_numpy(np.packbits(self.mask.numpy()))


def _shards(patches: Sequence[Patch], shape: Sequence[int]) -> dict[int, Shard]:
    """The shards that these versions make up."""
    shards: dict[int, Shard] = {}
    for patch in patches:
        parts = {name: name.partition(".") for name in sorted(patch.state, reverse=True)}  # masks before changes
        for name, (kind, _, index) in parts.items():
            if kind == "mask":
                if len(patch.state[name]) != -(-shape[0] * shape[1] // 8):
                    raise PatchError(
                        f"expected masks of {shape[0]} x {shape[1]} in {patch.label}; got others: edit again"
                    )
                bits = np.unpackbits(patch.state[name].numpy(), count=shape[0] * shape[1])
                mask = torch.from_numpy(bits).bool().view(*shape)
                shards[int(index)] = Shard(mask, torch.zeros(*shape))
            elif kind == "delta":
                shard = shards[int(index)]
                shard.change[shard.mask] += patch.state[name]
    return shards


def distance(inputs: Tensor, where: Tensor, delta: Tensor) -> Tensor:
    """How far the side memory moves the matrix's output, mean over the tokens `where` says. (rows,)

    Args:
        inputs: (rows, columns, in).
        where: (rows, columns), boolean.
        delta: W′ − W. (out, in)
    """
    moved = (inputs.to(delta.dtype) @ delta.T).norm(dim=-1) * where  # (rows, columns)
    return moved.sum(1) / where.sum(1)


def margin_loss(near: Tensor, far: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """Equation 4: distances of edits (rows,) and of unrelated text (pieces,); each term over what violates it."""
    gaps = (far[:, None] - near + gamma, far - alpha, beta - near)
    return sum((gap.clamp(min=0).sum() / (gap > 0).sum().clamp(min=1) for gap in gaps), torch.zeros_like(near[0]))


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """TIES: each change is cut to its largest entries, the sign of the larger sum is elected, and entries that agree
    with it are averaged."""
    kept = []
    for delta in deltas:
        flat = delta.flatten()
        count = max(1, int(density * len(flat)))
        largest = flat.abs().topk(count).indices
        kept.append(torch.zeros_like(flat).index_put((largest,), flat[largest]).view(delta.shape))
    stacked = torch.stack(kept)  # (shards, out, in)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = stacked.sign() == elected
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


@dataclass(eq=False)
class SideMemory:
    """Side memories and the hook that routes to them."""

    module: str
    deltas: Tensor  # (memories, out, in)
    thresholds: Tensor  # (memories,)

    def attach(self, lm: LM):
        return [hook_output(lm, self.module, self._route)]

    def _route(self, context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
        def choose() -> Tensor:
            moved = torch.stack([distance(inputs, context.of_prompt, delta) for delta in self.deltas], 1)
            farthest, chosen = torch.where(moved > self.thresholds, moved, -1.0).max(1)  # (rows,)
            return torch.where(farthest >= 0, chosen, -1)

        chosen = context.decision(self, choose)
        for i, delta in enumerate(self.deltas):
            rows = (chosen == i).nonzero()[:, 0]
            if len(rows):
                moved = (inputs[rows].to(delta.dtype) @ delta.T).to(outputs.dtype)
                outputs = outputs.index_add(0, rows, moved)
        return outputs
