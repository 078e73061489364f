"""MEND: Fast Model Editing at Scale. Mitchell, Lin, Bosselut, Finn, Manning 2021, arXiv 2110.11309.

The gradient of an edit's loss is a poor edit, but a network can learn to turn it into a good one. It is never formed:
the network reads its factors, one input u and one output gradient δ per token, and gives others.

    z = [norm(u); norm(δ)]                         norm: by statistics that run along in training
    h = z + relu(s₁ ⊙ (U₁V₁z + b₁) + o₁),  [ũ; δ̃] = h + relu(s₂ ⊙ (U₂V₂h + b₂) + o₂)
    W ← W − α Σ_tokens δ̃ ũᵀ                        trained on c_e · L_edit + L_loc                     (§3, Alg. 1)

Matrices of one shape share the network; s, o and the step size α are each matrix's own. L_edit: NLL of the answer on
the edit's prompt and on a rewording; L_loc: KL between the model before and after on other facts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from reknow.editors import open_editor
from reknow.edits import Case, Edit
from reknow.gradients import Factors, RunningNorm, gradient_factors, matrices, row_changes
from reknow.layers import resolve_layers
from reknow.lessons import Exam, instructed, lessons
from reknow.loop import seeded
from reknow.methods.base import Learned, checked, weights_patch
from reknow.patches import Delta, Dense, LowRank, Patch
from reknow.tokens import Text
from reknow.training import Training, split, train

if TYPE_CHECKING:
    from reknow.lm import LM


@dataclass(frozen=True)
class MEND(Learned):
    """A network, trained once for a model, that turns an edit's gradient into a change of the weights."""

    editor: str | None = None
    """File or folder of the trained editor; None: the one that is bundled for the model. The editor brings along the
    layers, rank, `unit_gradient` and `instructed` with which it was trained."""
    layers: tuple[int, ...] | None = None
    """Layers whose MLP matrices are changed; None: the last three."""
    rank: int = 1920
    """Of the network's matrices, at most their width."""
    unit_gradient: bool = False
    """Every token's δ is scaled to length 1 before anything else."""
    instructed: bool = False
    """The edit's instruction stands before its prompt."""
    edits_together: int = 1
    """Edits that are made at once in training."""
    edit_weight: float = 0.1
    """c_e, of the edit loss against the locality loss."""
    step_size: float = 1e-3
    """α at the start, in units of each matrix's root mean square."""
    step_size_rate: float = 1e-4
    """Learning rate of α, in the same unit."""
    learning_rate: float = 1e-6
    """Of Adam, for the network."""
    seed: int = 0
    """Of the network's first weights."""

    training: ClassVar[Training] = Training(
        steps=4000, batch_size=8, clip_norm=100.0, validate_every=250, checkpoint_every=250
    )

    @property
    def name(self) -> str:
        return "mend"

    def fit(
        self,
        lm: LM,
        cases: Sequence[Case],
        out: str | Path,
        training: Training | None = None,
        *,
        progress: bool = False,
    ) -> MEND:
        training = training or self.training
        learning, held = split(cases, training)
        layers = resolve_layers(lm, self.layers or tuple(range(max(0, lm.layers - 3), lm.layers)))
        method = replace(self, editor=None, layers=tuple(layers))
        learner = _Learner(method, lm)
        path = train(method, lm, learner, learning, held, out, training, progress=progress)
        return replace(self, editor=path)

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = checked(self, edits, subject=False)
        editor = open_editor(self, lm)
        trained = MEND(**{**editor.settings, "layers": tuple(editor.settings["layers"])})
        network = trained._network(lm)
        network.load_state_dict(editor.tensors)
        texts = [Text(trained._prompt(edit), edit.target_new) for edit in edits]
        deltas: dict[str, Delta] = {}
        with torch.no_grad():
            factors, loss = gradient_factors(lm, network.names, min(network.layers), lm.encode(texts))
            for name, (left, right) in network(factors).items():
                left, right = left[factors[name].keep], right[factors[name].keep]  # (n, out), (n, in)
                whole = len(left) >= min(left.shape[1], right.shape[1])
                deltas[name] = Dense(left.T @ right) if whole else LowRank(left.T.contiguous(), right)
        return weights_patch(self, lm, edits, deltas, notes={"layers": list(network.layers), "loss": loss})

    def _network(self, lm: LM) -> MENDNetwork:
        with seeded(self.seed, "mend"):
            return MENDNetwork(self, lm).to(lm.device)

    def _prompt(self, edit: Edit) -> str:
        return instructed(edit, edit.text) if self.instructed else edit.text


class MENDNetwork(nn.Module):
    """The networks of all shapes, their statistics, and the step sizes."""

    def __init__(self, method: MEND, lm: LM):
        super().__init__()
        assert method.layers is not None
        self.layers, self.names, self.unit = method.layers, matrices(lm, method.layers), method.unit_gradient
        shapes = {name: tuple(lm.base_weight(name).shape) for name in self.names}
        self._kind = {name: f"{out}x{inside}" for name, (out, inside) in shapes.items()}
        alike = {kind: [n for n in self.names if self._kind[n] == kind] for kind in self._kind.values()}
        self._mode = {name: alike[kind].index(name) for name, kind in self._kind.items()}
        self.transforms = nn.ModuleDict(
            {
                self._kind[n]: Transform(shapes[n][1], shapes[n][0], method.rank, len(alike[self._kind[n]]))
                for n in self.names
            }
        )
        self.step = nn.Parameter(torch.full((len(self.names),), method.step_size))
        self._unit = [float(lm.base_weight(name).float().square().mean().sqrt()) for name in self.names]

    def observe(self, factors: Mapping[str, Factors]) -> None:
        """Takes the factors into the statistics."""
        for name, found in factors.items():
            self._transform(name).norm.observe(torch.cat(self._scaled(found), 1))

    def forward(self, factors: Mapping[str, Factors]) -> dict[str, tuple[Tensor, Tensor]]:
        """name → (−α δ̃, ũ) at their places, zero elsewhere. (rows, columns, out), (rows, columns, in)"""
        changes = {}
        for i, name in enumerate(self.names):
            found = factors[name]
            u, delta = self._transform(name)(*self._scaled(found), self._mode[name])
            changes[name] = found.spread(-self.step[i] * self._unit[i] * delta), found.spread(u)
        return changes

    def _transform(self, name: str) -> Transform:
        transform = self.transforms[self._kind[name]]
        assert isinstance(transform, Transform)
        return transform

    def _scaled(self, found: Factors) -> tuple[Tensor, Tensor]:
        u, delta = found.flat()
        return u, delta / delta.norm(dim=1, keepdim=True) if self.unit else delta


class Transform(nn.Module):
    """[u; δ] → [ũ; δ̃] for all matrices of one shape."""

    def __init__(self, inside: int, out: int, rank: int, modes: int):
        super().__init__()
        self.sizes = [inside, out]
        self.norm = RunningNorm(inside + out)
        self.blocks = nn.ModuleList([Residual(inside + out, rank, modes) for _ in range(2)])

    def forward(self, u: Tensor, delta: Tensor, mode: int) -> tuple[Tensor, Tensor]:
        """(n, in), (n, out) → the same."""
        state = self.norm(torch.cat([u, delta], 1))
        for block in self.blocks:
            state = block(state, mode)
        u, delta = state.split(self.sizes, 1)
        return u, delta


class Residual(nn.Module):
    """x + relu(s ⊙ (U V x + b) + o), the identity at the start; s and o by mode."""

    def __init__(self, size: int, rank: int, modes: int):
        super().__init__()
        rank = min(rank, size)
        self.left = nn.Parameter(torch.zeros(size, rank))  # U
        self.right = nn.Parameter(torch.randn(rank, size))  # V
        self.bias = nn.Parameter(torch.zeros(size))
        self.scale = nn.Parameter(torch.ones(modes, size))
        self.shift = nn.Parameter(torch.zeros(modes, size))

    def forward(self, x: Tensor, mode: int) -> Tensor:
        inner = (x @ self.right.T) @ self.left.T + self.bias
        # A clamp, unlike relu, has a gradient at zero, where all of it starts.
        return x + (inner * self.scale[mode] + self.shift[mode]).clamp(min=0)


class _Learner:
    """MEND's training step (Alg. 1)."""

    def __init__(self, method: MEND, lm: LM):
        self.method, self.lm = method, lm
        self.module = method._network(lm)

    def optimizer(self) -> torch.optim.Optimizer:
        rest = [p for name, p in self.module.named_parameters() if name != "step"]
        return torch.optim.Adam(
            [
                {"params": rest, "lr": self.method.learning_rate},
                {"params": [self.module.step], "lr": self.method.step_size_rate},
            ]
        )

    def loss(self, batch: Sequence[Case], chance: random.Random) -> tuple[Tensor, dict[str, float]]:
        return self._trial(batch, chance, learn=True)

    @torch.no_grad()
    def validate(self, cases: Sequence[Case]) -> dict[str, float]:
        sums: dict[str, float] = {}
        size = self.method.training.batch_size
        parts = [cases[i : i + size] for i in range(0, len(cases), size)]
        for i, part in enumerate(parts):
            loss, shown = self._trial(part, random.Random(i), learn=False)
            for name, value in (shown | {"loss": float(loss)}).items():
                sums[name] = sums.get(name, 0.0) + value * len(part) / len(cases)
        return sums

    def _trial(self, batch: Sequence[Case], chance: random.Random, *, learn: bool) -> tuple[Tensor, dict[str, float]]:
        """Each group of cases is edited by itself, all groups in one batch, and examined."""
        found = lessons(batch, chance)
        layer = min(self.module.layers)
        factors, _ = gradient_factors(
            self.lm, self.module.names, layer, self.lm.encode([lesson.edit for lesson in found])
        )
        if learn:
            self.module.observe(factors)
        changes = {
            name: tuple(self._grouped(side, len(batch)) for side in sides)
            for name, sides in self.module(factors).items()
        }
        exam = Exam(self.lm, found, layer)
        with row_changes(self.lm, self._of_rows(changes, exam.inside_of)):
            edit, made = exam.edit_loss()
        with row_changes(self.lm, self._of_rows(changes, exam.outside_of)):
            stay, kept = exam.locality_loss()
        loss = self.method.edit_weight * edit + stay
        return loss, {"L_edit": edit.item(), "L_loc": stay.item(), "made": made, "kept": kept}

    def _grouped(self, side: Tensor, cases: int) -> Tensor:
        """Factors of the cases that are edited together, in one row. (groups, edits_together · columns, features)"""
        each = self.method.edits_together
        missing = -cases % each
        side = torch.cat([side, side.new_zeros(missing, *side.shape[1:])]) if missing else side
        return side.reshape(-1, each * side.shape[1], side.shape[2])

    def _of_rows(self, changes: Mapping[str, tuple[Tensor, ...]], lesson: Tensor) -> dict[str, Any]:
        group = lesson // self.method.edits_together
        return {name: tuple(side[group] for side in sides) for name, sides in changes.items()}
