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
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from reknow.descent import Answers, check_finite
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.keys import prompt_states, spread
from reknow.layers import depth_layer
from reknow.memory import Reading, on_output, versions
from reknow.methods.base import MemoryMethod, checked, conflicts, memory_patch
from reknow.patches import Kind, Patch
from reknow.tokens import Row, Text

if TYPE_CHECKING:
    from reknow.lm import LM

DEPTH = 0.75
"""The papers' layers as a share of the depth: keys at 35 of 48, blocks right above (GPT-2 XL)."""
SLIVER = 1e-5
"""What keeps two radii that meet apart, in the unit of distances."""
SAME = 1e-3
"""Keys that are closer, in the unit of distances, are the same prompt in another batch."""


@dataclass(frozen=True)
class MELO(MemoryMethod):
    """LoRA blocks beside value matrices, looked up by the prompt."""

    kind: ClassVar[Kind] = "hook"

    layer: int | None = None
    """Layer whose value matrix gives the keys and has the lowest blocks; None: at three quarters of the depth."""
    span: int = 2
    """How many layers, from that one up, have blocks."""
    radius: float = 0.3
    """Of a new cluster, in units of the distance between unrelated texts in that layer (in the paper 0.5, plain)."""
    rank: int = 2
    """Of a block."""
    block_size: int = 4
    """Edits of one call that share a block; another call opens another block."""
    steps: int = 100
    """Updates of a block at most."""
    learning_rate: float = 0.03
    """Of Adam, in units in which one step moves a matrix's output by about this many of its root mean squares."""
    stop_loss: float = 0.05
    """A block is finished when the loss of its edits (nats a token) is below."""
    conflict: Literal["update", "refuse"] = "update"
    """What becomes of an edit whose prompt is stored with another answer."""
    seed: int = 0
    """Of the blocks at the start."""

    @property
    def name(self) -> str:
        return "melo"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = checked(self, edits, subject=False)
        clashes = conflicts(self, lm, edits, self.conflict)
        layer = depth_layer(lm, DEPTH) if self.layer is None else lm.check_layer(self.layer)
        modules = list(lm.parts.value[layer : layer + self.span])
        patches = versions(lm.patches, self.name)
        if patches and patches[-1].memory["modules"] != modules:
            raise InputError(
                f"expected edits of {patches[-1].memory['modules']}, where the memory is; got {modules}: change layer"
            )
        rows = lm.encode([Text(edit.text, edit.target_new) for edit in edits])
        keys, _ = prompt_states(lm, rows, modules[0])
        first = sum(patch.memory["opened"] for patch in patches)
        blocks, losses = [], []
        for start in range(0, len(rows), self.block_size):
            block, history = self._learn(
                lm, rows[start : start + self.block_size], layer, modules, first + len(blocks)
            )
            blocks.append(block)
            losses.append(history)
        state = {"keys": keys.cpu()}
        for i, module in enumerate(modules):
            state[f"down.{module}"] = torch.stack([block[i][0] for block in blocks]).cpu()
            state[f"up.{module}"] = torch.stack([block[i][1] for block in blocks]).cpu()
        about = {
            "modules": modules,
            "unit": spread(lm, layer),
            "radius": self.radius * spread(lm, layer),
            "opened": len(blocks),
            "labels": [list(row.target_ids) for row in rows],
            "blocks": [first + i // self.block_size for i in range(len(rows))],
        }
        notes = {"layer": layer, "losses": losses, "conflicts": clashes}
        return memory_patch(self, lm, edits, state, memory=about, notes=notes)

    def _learn(
        self, lm: LM, rows: Sequence[Row], layer: int, modules: list[str], number: int
    ) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
        """Per module the block's two factors, (rank, in) and (out, rank); and the loss before every update."""
        generator = torch.Generator().manual_seed(self.seed + number)
        trial = _Trial()
        groups = []
        for module in modules:
            inputs, outputs = prompt_states(lm, rows, module)
            length, size = float(inputs.norm(dim=1).mean()), float(outputs.square().mean().sqrt())
            start = torch.randn(self.rank, inputs.shape[1], generator=generator).to(inputs) / length
            down, up = start.requires_grad_(), outputs.new_zeros(outputs.shape[1], self.rank, requires_grad=True)
            trial.blocks[module] = down, up
            groups.append({"params": [down], "lr": self.learning_rate / length})
            groups.append({"params": [up], "lr": self.learning_rate * size})
        optimizer = torch.optim.Adam(groups)
        losses: list[float] = []
        with lm.trying(self.name, trial), torch.enable_grad():
            answers = Answers(lm, rows, layer)
            for _ in range(self.steps):
                loss = answers.nll(lambda part: None)
                losses.append(check_finite(loss.mean()))
                if float(loss.detach().max()) < self.stop_loss:
                    break
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()
        return [(down.detach(), up.detach()) for down, up in trial.blocks.values()], losses

    @staticmethod
    def memory(lm: LM, patches: Sequence[Patch]) -> Blocks:
        table = Clusters()
        for patch in patches:
            about = patch.memory
            for key, label, block in zip(patch.state["keys"], about["labels"], about["blocks"], strict=True):
                table.take(key, tuple(label), block, about["radius"], about["unit"])
        modules = patches[-1].memory["modules"]
        factors = {
            module: tuple(
                torch.cat([p.state[f"{part}.{module}"] for p in patches]).to(lm.device) for part in ("down", "up")
            )
            for module in modules
        }
        return Blocks(table, factors)


@dataclass
class Cluster:
    """Prompts with one answer that lie close together."""

    centre: Tensor  # (in,)
    radius: float
    label: tuple[int, ...]
    points: list[tuple[Tensor, int]]
    """Key (in,) and block of each edit in it."""


@dataclass
class Clusters:
    """The table of clusters; the edits go through it in their order."""

    found: list[Cluster] = field(default_factory=list)

    def take(self, key: Tensor, label: tuple[int, ...], block: int, radius: float, unit: float) -> None:
        """Places one edit; see the head of this file. key: (in,)"""
        distances = [float(_distances(cluster.centre[None], key)) for cluster in self.found] or [float("inf")]
        distance, nearest = min((distance, i) for i, distance in enumerate(distances))
        if distance > radius + (self.found[nearest].radius if self.found else 0):
            self.found.append(Cluster(key, radius, label, [(key, block)]))
            return
        cluster = self.found[nearest]
        if label == cluster.label:
            cluster.points.append((key, block))
            points = torch.stack([point for point, _ in cluster.points])
            cluster.centre = points.mean(0)
            cluster.radius = max(float(_distances(points, cluster.centre).max()), radius)
            return
        if distance <= SAME * unit:  # the same prompt: the old answer goes
            self.found[nearest] = Cluster(key, cluster.radius, label, [(key, block)])
            return
        cluster.radius = distance / 2 - SLIVER * unit
        self.found.append(Cluster(key, distance / 2 + SLIVER * unit, label, [(key, block)]))
        inside = [_distances(point[None], cluster.centre) <= cluster.radius for point, _ in cluster.points]
        cluster.points = [point for point, kept in zip(cluster.points, inside, strict=True) if bool(kept)]


def _distances(points: Tensor, key: Tensor) -> Tensor:
    """(n,) of points (n, in)."""
    return (points.float() - key.float()).norm(dim=1)


class Blocks:
    """The blocks of all edits, and the hooks that add the right one."""

    def __init__(self, table: Clusters, factors: dict[str, tuple[Tensor, ...]]):
        self.factors = factors
        """module → (blocks, rank, in), (blocks, out, rank)."""
        device = next(iter(factors.values()))[0].device
        self.centres = torch.stack([cluster.centre for cluster in table.found]).to(device)
        self.radii = torch.tensor([cluster.radius for cluster in table.found], device=device)
        self.points = [
            (torch.stack([p for p, _ in c.points]).to(device), [b for _, b in c.points]) if c.points else None
            for c in table.found
        ]

    def attach(self, lm: LM):
        return [on_output(lm, module, partial(self._add, module)) for module in self.factors]

    def _block(self, query: Tensor) -> int:
        """The block of a prompt whose key is `query` (in,), or −1."""
        distances = _distances(self.centres, query)
        nearest = int(distances.argmin())
        points = self.points[nearest]
        if distances[nearest] > self.radii[nearest] or points is None:
            return -1
        return points[1][int(_distances(points[0], query).argmin())]

    def _add(self, module: str, reading: Reading, inputs: Tensor, outputs: Tensor) -> Tensor:
        def choose() -> Tensor:
            return torch.tensor([self._block(query) for query in reading.at_end(inputs)], device=inputs.device)

        lowest = module == next(iter(self.factors))  # the others run behind it
        block = reading.decided(self, choose if lowest else None)  # (rows,)
        down, up = (factor[block] for factor in self.factors[module])  # (rows, rank, in), (rows, out, rank)
        added = inputs.to(down.dtype) @ down.mT @ up.mT
        return outputs + torch.where(block[:, None, None] >= 0, added, 0.0)


class _Trial:
    """The hooks while a block is learned: every prompt takes it."""

    def __init__(self):
        self.blocks: dict[str, tuple[Tensor, Tensor]] = {}

    def attach(self, lm: LM):
        return [on_output(lm, module, partial(self._add, module)) for module in self.blocks]

    def _add(self, module: str, _reading: Reading, inputs: Tensor, outputs: Tensor) -> Tensor:
        down, up = self.blocks[module]
        return outputs + inputs.to(down.dtype) @ down.T @ up.T
