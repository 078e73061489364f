"""MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA. Yu et al. 2023, arXiv 2312.11795.

Every few edits get a LoRA block of their own, x ↦ B A x beside some value matrices. A table of clusters, as in GRACE,
says which block a prompt takes: the key is what enters the first of these matrices at the prompt's last token; in the
nearest cluster, if its radius holds the key, the nearest stored key names the block. All other prompts take none.

A key far from all clusters opens one. Near a cluster with the same answer it joins: the centre moves to the mean, the
radius grows to the farthest key. Near one with another answer both radii shrink to half their distance, and keys that
fall outside are forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from reknow.checks.bounds import NonNegative, Number, Rank, Rate, Units
from reknow.editing.descent import adam_update
from reknow.edits import Edit
from reknow.errors import PatchError
from reknow.files.schema import Count, Listed, Strict
from reknow.lm import LM
from reknow.memories.base import SideModuleMethod, memory_patch, prepare, train_beside
from reknow.memories.codebook import Clusters
from reknow.memories.distances import distance_scale, prompt_states
from reknow.model.forward_context import ForwardContext
from reknow.model.tokens import EncodedText, Text
from reknow.patching.memory import Hooks, hook_output
from reknow.patching.patches import Patch
from reknow.patching.state_spec import CountedBy, StateSpec, check_matrix


class VersionFields(Strict):
    """What a version knows besides its tensors."""

    modules: list[str] = Field(min_length=1)
    unit: float = Field(ge=0)
    """The distance scale."""
    radius: float = Field(ge=0)
    """Radius of a new cluster."""
    opened: Annotated[Count, CountedBy("blocks")]
    """How many blocks this version adds."""
    labels: Annotated[Listed[Listed[Count]], CountedBy("edits")]
    """Tokens of each edit's answer."""
    blocks: Annotated[Listed[Count], CountedBy("edits")]
    """The block of each edit, counted over all versions."""


@dataclass(frozen=True)
class MELO(SideModuleMethod):
    """LoRA blocks beside value matrices, looked up by the prompt."""

    for_all = ("units", "rank")
    depth: ClassVar[float] = 0.75
    """The papers' layers as a share of the depth: keys at 35 of 48, blocks right above (GPT-2 XL)."""
    state_spec: ClassVar[StateSpec] = StateSpec(
        {"keys": "float32 edits in", "down.*": "float32 blocks rank in.*", "up.*": "float32 blocks out.* rank"},
        VersionFields,
    )

    span: Number = 2
    """How many layers have blocks, from the one that gives the keys up."""
    radius: NonNegative = 1.0
    """Radius of a new cluster, in units of the distance in that layer between questions of the same wording about
    different subjects (in the paper 0.5, plain)."""
    rank: Rank = 2
    """Rank of a block."""
    block_size: Number = 4
    """Edits of one call that share a block; another call begins another block."""
    learning_rate: Rate = 0.03
    """Learning rate of Adam, in units in which one step moves a matrix's output by about this many of its root mean
    squares."""
    units: Units = "relative"
    """`absolute`: the radius and the learning rate are plain numbers (0.5 in the paper, and 0.001 times the root of
    the number of blocks that its code reserves), and a block's first factor starts uniform within 1/√rank."""

    @property
    def name(self) -> str:
        return "melo"

    def modules(self, lm: LM, layer: int) -> list[str]:
        return list(lm.parts.value[layer : layer + self.span])

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, layer, modules, stored, notes = prepare(self, lm, edits)
        rows = lm.encode([Text.asked(edit) for edit in edits])
        keys, _ = prompt_states(lm, rows, modules[0])
        first, size = sum(patch.memory["opened"] for patch in stored), self.block_size
        trained = [
            self._train(lm, rows[start : start + size], layer, modules, first + i)
            for i, start in lm.progress.each("blocks of edits", [*enumerate(range(0, len(rows), size))])
        ]
        state = {"keys": keys}
        for i, module in enumerate(modules):
            state[f"down.{module}"] = torch.stack([factors[i][0] for factors, _ in trained])
            state[f"up.{module}"] = torch.stack([factors[i][1] for factors, _ in trained])
        unit = 1.0 if self.units == "absolute" else distance_scale(lm, modules[0])
        memory = {
            "modules": modules,
            "unit": unit,
            "radius": self.radius * unit,
            "opened": len(trained),
            "labels": [list(row.target_ids) for row in rows],
            "blocks": [first + i // size for i in range(len(rows))],
        }
        notes["losses"] = [losses for _, losses in trained]
        return memory_patch(self, lm, edits, state, memory=memory, notes=notes)

    def _train(
        self, lm: LM, rows: Sequence[EncodedText], layer: int, modules: list[str], number: int
    ) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
        """Per module the block's two factors, (rank, in) and (out, rank); and the loss before every update."""
        generator = torch.Generator().manual_seed(self.seed + number)
        block: dict[str, tuple[Tensor, Tensor]] = {}
        groups = []
        for module in modules:
            inputs, outputs = prompt_states(lm, rows, module)
            if self.units == "absolute":
                length = size = 1.0
                start = (2 * torch.rand(self.rank, inputs.shape[1], generator=generator) - 1) / self.rank**0.5
            else:
                length, size = float(inputs.norm(dim=1).mean()), float(outputs.square().mean().sqrt())
                start = torch.randn(self.rank, inputs.shape[1], generator=generator) / length
            start = start.to(inputs)
            down, up = start.requires_grad_(), outputs.new_zeros(outputs.shape[1], self.rank, requires_grad=True)
            block[module] = down, up
            groups.append({"params": [down], "lr": self.learning_rate / length})
            groups.append({"params": [up], "lr": self.learning_rate * size})

        def add(module: str, _context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
            down, up = block[module]
            return outputs + inputs.to(down.dtype) @ down.T @ up.T

        hooks = Hooks({module: partial(add, module) for module in modules})
        update = adam_update(torch.optim.Adam(groups))
        passes = train_beside(self, lm, hooks, rows, layer, update, lambda losses: losses.max() < self.stop_loss)
        return [(down.detach(), up.detach()) for down, up in block.values()], [fmean(losses) for losses in passes]

    @staticmethod
    def running_memory(lm: LM, patches: Sequence[Patch]) -> _Blocks:
        table, modules = Clusters(), patches[-1].memory["modules"]
        for patch in patches:
            keys, memory = patch.state["keys"].to(lm.device_of(modules[0])), patch.memory
            for key, answer, block in zip(keys, memory["labels"], memory["blocks"], strict=True):
                table.insert(key, tuple(answer), block, memory["radius"], memory["unit"])
        count = sum(patch.memory["opened"] for patch in patches)
        if any(block >= count for patch in patches for block in patch.memory["blocks"]):
            raise PatchError(f"expected edits in the {count} blocks of {patches[-1].label}; got others: edit again")
        factors = {}
        for module in modules:
            names = f"down.{module}", f"up.{module}"
            down, up = (torch.cat([patch.state[name] for patch in patches]) for name in names)
            check_matrix(lm, module, {"in": (down, 2), "out": (up, 1)})
            factors[module] = down.to(lm.device_of(module)), up.to(lm.device_of(module))
        check_matrix(lm, modules[0], {"in": (patches[-1].state["keys"], 1)})
        return _Blocks(table, factors)


@dataclass(eq=False)
class _Blocks:
    """The blocks of all edits, and the hooks that add the right one."""

    table: Clusters
    factors: dict[str, tuple[Tensor, Tensor]]
    """module → (blocks, rank, in), (blocks, out, rank)."""

    def attach(self, lm: LM):
        return (hook_output(lm, module, partial(self._add, module)) for module in self.factors)

    def _add(self, module: str, context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
        def choose() -> Tensor:
            queries = context.last_prompt_state(inputs)
            return torch.tensor([self.table.find(query) for query in queries], device=inputs.device)

        lowest = module == next(iter(self.factors))  # the others run behind it
        block = context.decision(self, choose if lowest else None).to(inputs.device)  # (rows,)
        down, up = (factor[block] for factor in self.factors[module])  # (rows, rank, in), (rows, out, rank)
        added = inputs.to(down.dtype) @ down.mT @ up.mT
        return outputs + torch.where(block[:, None, None] >= 0, added, 0.0)
