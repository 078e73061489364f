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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reknow.checks.bounds import Number, Rate, Seed, Units, Weight
from reknow.edits import Edit
from reknow.errors import PatchError
from reknow.files.schema import Count, Listed, Strict
from reknow.memories.base import SideModuleMethod, memory_patch, prepare
from reknow.memories.distances import EPSILON, SAME_KEY_DISTANCE, distance_scale, prompt_states
from reknow.model.exact import finite_loss
from reknow.model.forward_context import ForwardContext
from reknow.model.scored_tokens import AnswerLoss
from reknow.model.tokens import Row, Text
from reknow.patching.memory import Hooks, hook_output
from reknow.patching.patches import Patch
from reknow.patching.state_spec import CountedBy, StateSpec, check_matrix

if TYPE_CHECKING:
    from reknow.lm import LM

DEPTH = 0.8
"""The papers' layers as a share of the depth: 35 of 48 (GPT-2 XL), 27 of 32 (Llama-2)."""

Replacement = Literal["prompt", "last", "before"]


class Memory(Strict):
    """What a version knows besides its tensors."""

    modules: list[str] = Field(min_length=1, max_length=1)
    replacement: Replacement
    labels: Annotated[Listed[Listed[Count]], CountedBy("keys")]
    """Tokens of each key's answer."""


@dataclass(frozen=True)
class GRACE(SideModuleMethod):
    """A codebook of edits beside one value matrix."""

    depth: ClassVar[float] = DEPTH
    state_spec: ClassVar[StateSpec] = StateSpec(
        {"slots": "int64 keys", "keys": "float32 keys in", "values": "float32 keys out", "radii": "float32 keys"},
        Memory,
    )

    epsilon: Weight = 0.9
    """Radius ε of a new key, in units of the distance in that layer between questions of the same wording
    about different subjects."""
    steps: Number = 100
    """Updates of the values at most."""
    learning_rate: Rate = 0.3
    """Of Adam, in units of the root mean square of the matrix's output."""
    stop_loss: Weight = 0.05
    """A value whose edits have a lower loss (nats a token) is finished; 0: all steps, as in the papers."""
    replacement: Replacement = "prompt"
    """Where the value is put: at all tokens of the prompt; at its last; or, as the authors' code does, at all before
    the last."""
    units: Units = "relative"
    """`absolute`: ε and the learning rate are plain numbers (both 1 in the papers), and values start uniform in
    [0, 1) instead of at the matrix's own output."""
    seed: Seed = 0
    """Of values that start at random."""

    @property
    def name(self) -> str:
        return "grace"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, layer, modules, before, notes = prepare(self, lm, edits)
        book = self.memory(lm, before) if before else Codebook.empty(lm, modules[0], self.replacement)
        rows = lm.encode([Text.asked(edit) for edit in edits])
        keys, outputs = prompt_states(lm, rows, book.module)
        unit = 1.0 if self.units == "absolute" else distance_scale(lm, layer)
        slots = [self._place(book, key, row.target_ids, unit) for key, row in zip(keys, rows, strict=True)]
        losses = self._train(lm, rows, layer, book, torch.tensor(slots, device=keys.device), outputs)
        touched = sorted(book.touched)
        parts = {"keys": book.keys[touched], "values": book.values[touched], "radii": book.radii[touched]}
        state = {"slots": torch.tensor(touched, dtype=torch.long), **parts}
        labels = [list(book.labels[slot]) for slot in touched]
        memory = {"modules": modules, "replacement": self.replacement, "labels": labels}
        notes |= {"slots": slots, "keys": len(book.keys), "losses": losses}
        return memory_patch(self, lm, edits, state, memory=memory, notes=notes)

    @staticmethod
    def memory(lm: LM, patches: Sequence[Patch]) -> Codebook:
        slots, known = torch.cat([patch.state["slots"] for patch in patches]), 0
        for patch in patches:
            own = patch.state["slots"].sort().values
            new = own[own >= known]
            if not torch.equal(new, known + torch.arange(len(new))) or bool((own < 0).any()):
                raise PatchError(
                    f"expected keys numbered one by one in {patch.label}; got others: make the edit again"
                )
            known += len(new)
        newest = torch.zeros(int(slots.max()) + 1, dtype=torch.long)
        newest = newest.scatter_reduce(0, slots, torch.arange(len(slots)), "amax")
        parts = ("keys", "values", "radii")
        keys, values, radii = (torch.cat([p.state[part] for p in patches])[newest].to(lm.device) for part in parts)
        labels = [tuple(label) for patch in patches for label in patch.memory["labels"]]
        about = patches[-1].memory
        check_matrix(lm, about["modules"][0], {"in": (keys, 1), "out": (values, 1)})
        return Codebook(about["modules"][0], about["replacement"], keys, values, radii, [labels[i] for i in newest])

    def _place(self, book: Codebook, key: Tensor, label: tuple[int, ...], unit: float) -> int:
        """Makes room for an edit as Algorithm 1 says; gives the number of its key. key: (in,)"""
        radius = self.epsilon * unit
        if not book.labels:
            return book.add(key, radius, label)
        distances, slots = book.nearest(key[None])
        distance, slot = float(distances), int(slots)
        if distance > radius + float(book.radii[slot]):
            return book.add(key, radius, label)
        if label == book.labels[slot]:
            # Rounding must not put the prompt outside of what was widened for it.
            book.change(slot, max(distance + EPSILON * unit, float(book.radii[slot])))
        elif distance <= SAME_KEY_DISTANCE * unit:  # the same prompt: the old answer goes
            book.change(slot, float(book.radii[slot]), label)
        else:
            book.change(slot, distance / 2 - EPSILON * unit)
            return book.add(key, distance / 2, label)
        return slot

    def _train(
        self, lm: LM, rows: Sequence[Row], layer: int, book: Codebook, slots: Tensor, outputs: Tensor
    ) -> list[float]:
        """Learns the values of the edits; gives the mean loss before every update.

        Args:
            slots: (edits,) number of each edit's key.
            outputs: (edits, out) what the matrix gives at each prompt's last token.
        """
        places, mine = slots.unique(return_inverse=True)  # (values,), (edits,)
        owner = [int((mine == i).nonzero()[0]) for i in range(len(places))]  # an edit of each value
        start, scale = outputs[owner], outputs[owner].square().mean(1, keepdim=True).sqrt()
        if self.units == "absolute":
            generator = torch.Generator().manual_seed(self.seed)
            start = torch.rand(start.shape, generator=generator).to(start)
            scale = torch.ones_like(scale)
        fresh = torch.tensor([int(slot) in book.fresh for slot in places], device=start.device)
        start = torch.where(fresh[:, None], start, book.values[places])
        # Adam's steps have the size of the learning rate, so values are searched in units of `scale`.
        scaled = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([scaled], lr=self.learning_rate)
        values = chosen = torch.zeros(0)

        def put(context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
            if not len(values):  # the pass that records the blocks below
                return outputs
            everyone = torch.ones_like(chosen, dtype=torch.bool)
            return _replaced(context, outputs, values[chosen], everyone, self.replacement)

        def choose(part: Tensor) -> None:
            nonlocal chosen
            chosen = part

        losses: list[float] = []
        with lm.temporary_memory(self.name, Hooks({book.module: put})), torch.enable_grad():
            answers = AnswerLoss(lm, rows, layer)
            for _ in range(self.steps):
                values = (start + scale * scaled)[mine]
                loss = answers.nll(choose)
                losses.append(finite_loss(loss.mean()))
                worst = torch.zeros_like(scale[:, 0]).scatter_reduce(0, mine, loss.detach(), "amax")
                running = worst >= self.stop_loss
                if not bool(running.any()):
                    break
                before = scaled.detach().clone()
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()
                with torch.no_grad():  # Adam's momentum would carry finished values on
                    scaled.copy_(torch.where(running[:, None], scaled, before))
        book.values[places] = (start + scale * scaled).detach()
        return losses


@dataclass(eq=False)
class Codebook:
    """Keys, values, radii and answers, and the hook that looks them up."""

    module: str
    replacement: Replacement
    keys: Tensor  # (n, in), float32
    values: Tensor  # (n, out), float32
    radii: Tensor  # (n,)
    labels: list[tuple[int, ...]]
    """Tokens of each key's answer."""
    touched: set[int] = field(default_factory=set)
    fresh: set[int] = field(default_factory=set)
    """Keys that need a new value."""

    @classmethod
    def empty(cls, lm: LM, module: str, replacement: Replacement) -> Codebook:
        out, inside = lm.weight(module).shape
        sizes = (inside,), (out,), ()
        keys, values, radii = (torch.zeros(0, *size, device=lm.device) for size in sizes)
        return cls(module, replacement, keys, values, radii, [])

    def add(self, key: Tensor, radius: float, label: tuple[int, ...]) -> int:
        slot = len(self.labels)
        self.keys = torch.cat([self.keys, key[None]])
        self.values = torch.cat([self.values, self.values.new_zeros(1, self.values.shape[1])])
        self.radii = torch.cat([self.radii, self.radii.new_tensor([radius])])
        self.labels.append(label)
        self.touched.add(slot)
        self.fresh.add(slot)
        return slot

    def change(self, slot: int, radius: float, label: tuple[int, ...] | None = None) -> None:
        """Another radius, and perhaps another answer, which then needs another value."""
        self.radii[slot] = radius
        self.touched.add(slot)
        if label is not None:
            self.labels[slot] = label
            self.fresh.add(slot)

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(distance to the nearest key, its number) of each query (n, in)."""
        mode = "donot_use_mm_for_euclid_dist"  # the quick way loses small distances between large keys
        found = torch.cdist(queries.float(), self.keys, compute_mode=mode).min(1)
        return found.values, found.indices

    def attach(self, lm: LM):
        return [hook_output(lm, self.module, self._look_up)]

    def _look_up(self, context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
        def choose() -> Tensor:
            distances, slots = self.nearest(context.last_prompt_state(inputs))
            return torch.where(distances <= self.radii[slots], slots, -1)

        slots = context.decision(self, choose)  # (rows,)
        return _replaced(context, outputs, self.values[slots], slots >= 0, self.replacement)


def _replaced(
    context: ForwardContext, outputs: Tensor, values: Tensor, rows: Tensor, replacement: Replacement
) -> Tensor:
    """The outputs (rows, columns, out) with the values (rows, out) of the chosen rows where `replacement` says."""
    where = context.last_of_prompt if replacement == "last" else context.of_prompt  # (rows, columns)
    if replacement == "before":
        where = where & ~context.last_of_prompt
    where = (where.to(outputs.device) & rows[:, None])[..., None]
    return torch.where(where, values[:, None].to(outputs.dtype), outputs)
