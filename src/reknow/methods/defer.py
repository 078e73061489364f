"""DEFER: the baseline of GRACE's authors (Hartvigsen et al. 2022, arXiv 2211.11031, §4), after SERAC's idea of
deferring to another model (Mitchell et al. 2022, arXiv 2206.06520).

Beside one matrix W stand a gate and a linear map of the same size, both of which read the matrix's input x at the
prompt's last token. Where the gate is open, the map's output takes the place of the matrix's at all tokens:

    out = A x + a  where  σ(g·x + c) ≥ ½,   else W x;      while it learns   σ·(A x + a) + (1 − σ)·W x

Every edit trains gate and map further, and nothing protects the earlier ones.

An edit has one x. Adam moves the weights of a map that sees a single input by the same step up or down, as the signs
of x say: A changes by u sign(x)ᵀ, with u the change of the bias. So an edit is kept, and learned, as u, sign(x) and a
number for the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from reknow.checks.bounds import Formerly, Rate, Share, Units
from reknow.editing.descent import adam_update
from reknow.edits import Edit
from reknow.errors import PatchError
from reknow.files.schema import Strict
from reknow.lm import LM
from reknow.memories.base import SideModuleMethod, memory_patch, prepare, train_beside
from reknow.memories.distances import prompt_states
from reknow.model.forward_context import ForwardContext
from reknow.model.scored_tokens import AnswerLoss
from reknow.model.tokens import Text
from reknow.patching.memory import Hooks, hook_output
from reknow.patching.patches import Patch
from reknow.patching.state_spec import StateSpec, check_matrix


class VersionFields(Strict):
    """What a version knows besides its tensors."""

    modules: list[str] = Field(min_length=1, max_length=1)
    threshold: float


@dataclass(frozen=True)
class DEFER(SideModuleMethod):
    """A gate and a linear map beside one value matrix, trained edit by edit."""

    for_all = ("units", "threshold")
    depth: ClassVar[float] = 0.8
    """The layer of GRACE's experiments as a share of the depth."""
    state_spec: ClassVar[StateSpec] = StateSpec(
        {
            "signs": "int8 edits in",
            "moves": "float32 edits out",
            "opened": "float32 edits",
            "map?": "float32 out in+1",
            "gate?": "float32 in+1",
        },
        VersionFields,
    )

    learning_rate: Rate = 0.1
    """Learning rate of Adam: how far a step moves the map's output, in units of the root mean square of the matrix's
    output."""
    gate_learning_rate: Annotated[Rate, Formerly("gate_rate")] = 0.5
    """Learning rate of the gate: how far a step moves its logit; not used where units are `absolute`."""
    threshold: Share = 0.5
    """The gate opens at this probability."""
    units: Units = "relative"
    """`absolute`: all weights have one learning rate, a plain number (the authors': 0.1)."""

    @property
    def name(self) -> str:
        return "defer"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, layer, modules, stored, notes = prepare(self, lm, edits)
        gate = self.running_memory(lm, stored) if stored else Gate.new(lm, modules[0], self.threshold, self.seed)
        first = len(gate.moves)
        notes["losses"] = [self._train(lm, edit, layer, gate) for edit in lm.progress.each("edits", edits)]
        state = {"signs": gate.signs[first:], "moves": gate.moves[first:], "opened": gate.opened[first:]}
        if not stored:
            state |= {"map": gate.map, "gate": gate.gate}
        memory = {"modules": modules, "threshold": self.threshold}
        return memory_patch(self, lm, edits, state, memory=memory, notes=notes)

    def _train(self, lm: LM, edit: Edit, layer: int, gate: Gate) -> list[float]:
        """Trains gate and map on one more edit; gives the loss before every update."""
        rows = lm.encode([Text.asked(edit)])
        inputs, outputs = prompt_states(lm, rows, gate.module)
        reach = float(inputs[0].abs().sum()) + 1  # a step of every weight and of the bias moves the output this far
        move = outputs.new_zeros(len(outputs[0]), requires_grad=True)  # u
        opening = outputs.new_zeros((), requires_grad=True)
        if self.units == "absolute":
            rates = self.learning_rate, self.learning_rate
        else:
            size = float(outputs.square().mean().sqrt())
            rates = self.learning_rate * size / reach, self.gate_learning_rate / reach
        groups = [{"params": [move], "lr": rates[0]}, {"params": [opening], "lr": rates[1]}]
        value, logit = gate.read(inputs)  # (1, out), (1,)

        def probability() -> Tensor:  # of the gate, (1,)
            return (logit + reach * opening).sigmoid()

        def mix(context: ForwardContext, _inputs: Tensor, outputs: Tensor) -> Tensor:
            share = (context.of_prompt.to(outputs.device) * probability())[..., None]
            return share * (value + reach * move)[:, None] + (1 - share) * outputs

        def loss(answers: AnswerLoss) -> Tensor:  # (1, 2)
            return torch.stack([answers.nll(), probability().detach().to(lm.device)], 1)

        def finished(losses: Tensor) -> Tensor:
            return (losses[:, 0] < self.stop_loss) & (losses[:, 1] >= self.threshold)

        hooks, update = Hooks({gate.module: mix}), adam_update(torch.optim.Adam(groups))
        passes = train_beside(self, lm, hooks, rows, layer, update, finished, loss)
        gate.add(inputs[0].sign(), move.detach(), opening.detach())
        return [nll for ((nll, _),) in passes]

    @staticmethod
    def running_memory(lm: LM, patches: Sequence[Patch]) -> Gate:
        signs, moves, opened = (torch.cat([p.state[name] for p in patches]) for name in ("signs", "moves", "opened"))
        first, memory = patches[0].state, patches[-1].memory
        (module,) = memory["modules"]
        check_matrix(lm, module, {"in": (signs, 1), "out": (moves, 1)})
        shape = moves.shape[1], signs.shape[1] + 1
        if first["map"].shape != shape or first["gate"].shape != shape[1:]:
            raise PatchError(f"expected a map and a gate of one size in {patches[0].label}; got others: edit again")
        device = lm.device_of(module)
        tensors = (tensor.to(device) for tensor in (first["map"], first["gate"], signs, moves, opened))
        return Gate(module, memory["threshold"], *tensors)


@dataclass(eq=False)
class Gate:
    """The gate and the map at their start, what every edit added, and the hook that defers."""

    module: str
    threshold: float
    map: Tensor  # (out, in + 1), the bias last
    gate: Tensor  # (in + 1,), the bias last
    signs: Tensor  # (edits, in), int8
    moves: Tensor  # (edits, out)
    opened: Tensor  # (edits,)

    @classmethod
    def new(cls, lm: LM, module: str, threshold: float, seed: int) -> Gate:
        """Random weights like those of `torch.nn.Linear`, and no edits."""
        out, width = lm.weight(module).shape
        generator = torch.Generator().manual_seed(seed)
        gate, map = ((torch.rand(n, width + 1, generator=generator) * 2 - 1) / width**0.5 for n in (1, out))
        none = torch.zeros(0, width, dtype=torch.int8), torch.zeros(0, out), torch.zeros(0)
        return cls(module, threshold, *(tensor.to(lm.device_of(module)) for tensor in (map, gate[0], *none)))

    def add(self, signs: Tensor, move: Tensor, opening: Tensor) -> None:
        self.signs = torch.cat([self.signs, signs.to(torch.int8)[None]])
        self.moves = torch.cat([self.moves, move[None]])
        self.opened = torch.cat([self.opened, opening[None]])

    def read(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(the map's output, the gate's logit) of inputs (n, in)."""
        inputs = inputs.float()
        seen = inputs @ self.signs.float().T + 1  # (n, edits): sign(x)·x, and the bias
        value = inputs @ self.map[:, :-1].T + self.map[:, -1] + seen @ self.moves
        return value, inputs @ self.gate[:-1] + self.gate[-1] + seen @ self.opened

    def attach(self, lm: LM):
        return [hook_output(lm, self.module, self._defer)]

    def _defer(self, context: ForwardContext, inputs: Tensor, outputs: Tensor) -> Tensor:
        def choose() -> tuple[Tensor, Tensor]:
            value, logit = self.read(context.last_prompt_state(inputs))
            return value, logit.sigmoid() >= self.threshold

        value, deferred = context.decision(self, choose)
        where = (context.of_prompt.to(outputs.device) & deferred[:, None])[..., None]
        return torch.where(where, value[:, None].to(outputs.dtype), outputs)
