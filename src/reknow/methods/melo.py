"""MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA. Yu et al. 2023, arXiv 2312.11795.

Every few edits get a LoRA block of their own, x ↦ B A x beside some value matrices. A table of clusters, as in GRACE,
says which block a prompt takes: the key is what enters the first of these matrices at the prompt's last token; in the
nearest cluster, if its radius holds the key, the nearest point names the block. All other prompts take none.

A key far from all clusters opens one. Near a cluster with the same answer it joins: the centre moves to the mean, the
radius grows to the farthest point. Near one with another answer both radii shrink to half their distance, and points
that fall outside are forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from reknow.checks.bounds import Number, Rank, Rate, Seed, Weight
from reknow.editing.descent import adam_update, descend
from reknow.edits import Edit
from reknow.errors import PatchError
from reknow.files.schema import Count, Listed, Strict
from reknow.memories.base import SideModuleMethod, memory_patch, prepare
from reknow.memories.distances import EPSILON, SAME_KEY_DISTANCE, distance_scale, prompt_states
from reknow.model.forward_context import ForwardContext
from reknow.model.scored_tokens import AnswerLoss
from reknow.model.tokens import Row, Text
from reknow.patching.memory import Hooks, hook_output
from reknow.patching.patches import Patch
from reknow.patching.state_spec import CountedBy, StateSpec, check_matrix

if TYPE_CHECKING:
    from reknow.lm import LM

DEPTH = 0.75
"""The papers' layers as a share of the depth: keys at 35 of 48, blocks right above (GPT-2 XL)."""


class Memory(Strict):
    """What a version knows besides its tensors."""

    modules: list[str] = Field(min_length=1)
    unit: float = Field(ge=0)
    radius: float = Field(ge=0)
    opened: Annotated[Count, CountedBy("blocks")]
    labels: Annotated[Listed[Listed[Count]], CountedBy("edits")]
    """Tokens of each edit's answer."""
    blocks: Annotated[Listed[Count], CountedBy("edits")]
    """The block of each edit, counted over all versions."""


@dataclass(frozen=True)
class MELO(SideModuleMethod):
    """LoRA blocks beside value matrices, looked up by the prompt."""

    depth: ClassVar[float] = DEPTH
    state_spec: ClassVar[StateSpec] = StateSpec(
        {"keys": "float32 edits in", "down.*": "float32 blocks rank in.*", "up.*": "float32 blocks out.* rank"},
        Memory,
    )

    span: Number = 2
    """How many layers, from that one up, have blocks."""
    radius: Weight = 1.0
    """Of a new cluster, in units of the distance in that layer between questions of the same wording about
    different subjects (in the paper 0.5, plain)."""
    rank: Rank = 2
    """Of a block."""
    block_size: Number = 4
    """Edits of one call that share a block; another call opens another block."""
    steps: Number = 100
    """Updates of a block at most."""
    learning_rate: Rate = 0.03
    """Of Adam, in units in which one step moves a matrix's output by about this many of its root mean squares."""
    stop_loss: Weight = 0.05
    """A block is finished when the loss of its edits (nats a token) is below."""
    seed: Seed = 0
    """Of the blocks at the start."""

    @property
    def name(self) -> str:
        return "melo"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, layer, modules, before, notes = prepare(self, lm, edits, self.span)
        rows = lm.encode([Text.asked(edit) for edit in edits])
        keys, _ = prompt_states(lm, rows, modules[0])
        first = sum(patch.memory["opened"] for patch in before)
        parts = [rows[start : start + self.block_size] for start in range(0, len(rows), self.block_size)]
        learned = [self._learn(lm, part, layer, modules, first + i) for i, part in enumerate(parts)]
        state = {"keys": keys}
        for i, module in enumerate(modules):
            state[f"down.{module}"] = torch.stack([block[i][0] for block, _ in learned])
            state[f"up.{module}"] = torch.stack([block[i][1] for block, _ in learned])
        memory = {
            "modules": modules,
            "unit": distance_scale(lm, layer),
            "radius": self.radius * distance_scale(lm, layer),
            "opened": len(learned),
            "labels": [list(row.target_ids) for row in rows],
            "blocks": [first + i // self.block_size for i in range(len(rows))],
        }
        notes["losses"] = [losses for _, losses in learned]
        return memory_patch(self, lm, edits, state, memory=memory, notes=notes)

    def _learn(
        self, lm: LM, rows: Sequence[Row], layer: int, modules: list[str], number: int
    ) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
        """Per module the block's two factors, (rank, in) and (out, rank); and the loss before every update."""
        generator = torch.Generator().manual_seed(self.seed + number)
        block: dict[str, tuple[Tensor, Tensor]] = {}
        groups = []
        for module in modules:
            inputs, outputs = prompt_states(lm, rows, module)
            length, size = float(inputs.norm(dim=1).mean()), float(outputs.square().mean().sqrt())
            start = torch.randn(self.rank, inputs.shape[1], generator=generator).to(inputs) / length
            down, up = start.requires_grad_(), outputs.new_zeros(outputs.shape[1], self.rank, requires_grad=True)
            block[module] = down, up
            groups.append({"params": [down], "lr": self.learning_rate / length})
            groups.append({"params": [up], "lr": self.learning_rate * size})
        optimizer = torch.optim.Adam(groups)

        def add(module: str, _context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
            down, up = block[module]
            return outputs + inputs.to(down.dtype) @ down.T @ up.T

        with (
            lm.temporary_memory(self.name, Hooks({name: partial(add, name) for name in modules})),
            torch.enable_grad(),
        ):
            answers = AnswerLoss(lm, rows, layer)
            passes = descend(
                [answers.nll], adam_update(optimizer), self.steps, lambda losses: losses.max() < self.stop_loss
            )
        return [(down.detach(), up.detach()) for down, up in block.values()], [fmean(losses) for losses in passes]

    @staticmethod
    def memory(lm: LM, patches: Sequence[Patch]) -> Blocks:
        table = Clusters(torch.zeros_like(torch.cat([patch.state["keys"] for patch in patches])))
        for patch in patches:
            about = patch.memory
            for key, label, block in zip(patch.state["keys"], about["labels"], about["blocks"], strict=True):
                table.take(key, tuple(label), block, about["radius"], about["unit"])
        modules = patches[-1].memory["modules"]
        opened = sum(patch.memory["opened"] for patch in patches)
        if any(block >= opened for patch in patches for block in patch.memory["blocks"]):
            raise PatchError(f"expected edits in the {opened} blocks of {patches[-1].label}; got others: edit again")
        factors = {
            module: tuple(
                torch.cat([p.state[f"{part}.{module}"] for p in patches]).to(lm.device) for part in ("down", "up")
            )
            for module in modules
        }
        for module, (down, up) in factors.items():
            check_matrix(lm, module, {"in": (down, 2), "out": (up, 1)})
        check_matrix(lm, modules[0], {"in": (table.centres, 1)})
        return Blocks(table, factors)


@dataclass
class Cluster:
    """Prompts with one answer that lie close together."""

    radius: float
    label: tuple[int, ...]
    points: list[tuple[Tensor, int]]
    """Key (in,) and block of each edit in it."""


@dataclass
class Clusters:
    """The table of clusters; the edits go through it in their order."""

    centres: Tensor  # (room, in), as many in use as there are clusters
    found: list[Cluster] = field(default_factory=list)

    def take(self, key: Tensor, label: tuple[int, ...], block: int, radius: float, unit: float) -> None:
        """Places one edit; see the head of this file. key: (in,)"""
        distances = _distances(self.centres[: len(self.found)], key)
        nearest = int(distances.argmin()) if self.found else -1
        distance = float(distances[nearest]) if self.found else float("inf")
        if distance > radius + (self.found[nearest].radius if self.found else 0):
            self._open(key, radius, label, block)
            return
        cluster, centre = self.found[nearest], self.centres[nearest]
        if label == cluster.label:
            cluster.points.append((key, block))
            points = torch.stack([point for point, _ in cluster.points])
            centre.copy_(points.mean(0))
            cluster.radius = max(float(_distances(points, centre).max()), radius)
        elif distance <= SAME_KEY_DISTANCE * unit:  # the same prompt: the old answer goes
            centre.copy_(key)
            self.found[nearest] = Cluster(cluster.radius, label, [(key, block)])
        else:
            cluster.radius = distance / 2 - EPSILON * unit
            self._open(key, distance / 2 + EPSILON * unit, label, block)
            inside = [float(_distances(point[None], centre)) <= cluster.radius for point, _ in cluster.points]
            cluster.points = [point for point, kept in zip(cluster.points, inside, strict=True) if kept]

    def _open(self, key: Tensor, radius: float, label: tuple[int, ...], block: int) -> None:
        self.centres[len(self.found)] = key
        self.found.append(Cluster(radius, label, [(key, block)]))


def _distances(points: Tensor, key: Tensor) -> Tensor:
    """(n,) of points (n, in)."""
    return (points.float() - key.float()).norm(dim=1)


class Blocks:
    """The blocks of all edits, and the hooks that add the right one."""

    def __init__(self, table: Clusters, factors: dict[str, tuple[Tensor, ...]]):
        self.factors = factors
        """module → (blocks, rank, in), (blocks, out, rank)."""
        device = next(iter(factors.values()))[0].device
        self.centres = table.centres[: len(table.found)].to(device)
        self.radii = torch.tensor([cluster.radius for cluster in table.found], device=device)
        self.points = [
            (torch.stack([p for p, _ in c.points]).to(device), [b for _, b in c.points]) if c.points else None
            for c in table.found
        ]

    def attach(self, lm: LM):
        return (hook_output(lm, module, partial(self._add, module)) for module in self.factors)

    def _block(self, query: Tensor) -> int:
        """The block of a prompt whose key is `query` (in,), or −1."""
        distances = _distances(self.centres, query)
        nearest = int(distances.argmin())
        points = self.points[nearest]
        if distances[nearest] > self.radii[nearest] or points is None:
            return -1
        return points[1][int(_distances(points[0], query).argmin())]

    def _add(self, module: str, context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
        def choose() -> Tensor:
            return torch.tensor(
                [self._block(query) for query in context.last_prompt_state(inputs)], device=inputs.device
            )

        lowest = module == next(iter(self.factors))  # the others run behind it
        block = context.decision(self, choose if lowest else None)  # (rows,)
        down, up = (factor[block] for factor in self.factors[module])  # (rows, rank, in), (rows, out, rank)
        added = inputs.to(down.dtype) @ down.mT @ up.mT
        return outputs + torch.where(block[:, None, None] >= 0, added, 0.0)
