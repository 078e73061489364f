"""How a method that learns to edit is trained: its settings, what it gives to the loop, the order of the cases."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from reknow.checks.bounds import Natural, Number, Rate, Seed, check_settings
from reknow.edits import Case
from reknow.errors import InputError
from reknow.learning.editors import case_keys

__all__ = ["Draw", "Learner", "Split", "Training", "interleave", "parameter_groups", "shuffle", "split_cases"]


@dataclass(frozen=True)
class Training:
    """How an editor is trained, whatever the method."""

    steps: Number = 2000
    """Largest number of updates."""
    batch_size: Number = 8
    """Cases of a micro-batch; what they are to each other is the method's affair."""
    micro_batches: Number = 1
    """Micro-batches whose gradients make one update; a multiple of the number of processes."""
    warmup: Natural = 0
    """Updates at the start in which the learning rates rise to their values."""
    decay: bool = False
    """Whether the learning rates then fall linearly to 0 at the last update."""
    clip_norm: Rate | None = None
    """Largest norm of the gradient; None: any."""
    validation: Natural = 64
    """Cases set aside to choose the best editor by; 0: the last editor is taken."""
    validate_every: Number = 200
    """Updates between two validations."""
    patience: Number = 10
    """Validations without a lower loss after which the training ends."""
    checkpoint_every: Number = 200
    """Updates between two checkpoints."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Numbers in which losses and gradients are computed: no for the model's own, else mixed precision."""
    seed: Seed = 0
    """Seed of everything that is drawn at random."""
    tensorboard: bool = False
    """Whether the losses are written for TensorBoard too."""

    def __post_init__(self):
        check_settings(self)


def parameter_groups(module: nn.Module, learning_rate: float, own: Mapping[str, float]) -> list[dict]:
    """The parameters of a module for an optimizer: those named in `own` with their learning rates, the rest first."""
    named = dict(module.named_parameters())
    rest = [parameter for name, parameter in named.items() if name not in own]
    return [{"params": rest, "lr": learning_rate}, *({"params": [named[n]], "lr": rate} for n, rate in own.items())]


class Learner(Protocol):
    """What a method gives to the loop."""

    @property
    def module(self) -> nn.Module:
        """All that is learned and kept: parameters, and statistics as buffers. On the base model's device."""
        ...

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the module's parameters, with the paper's learning rates."""
        ...

    def loss(self, batch: Sequence[Case], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        """The scalar whose gradient is followed, and the paper's losses by name, to show.

        All choices come from `rng`; torch's own random state may be used too, it is seeded for the call.
        """
        ...

    def validate(self, cases: Sequence[Case]) -> dict[str, float]:
        """Measures on cases set aside; the editor with the lowest `loss` is kept. May adapt the module's buffers."""
        ...


Draw = Callable[[int], Sequence[Case]]
"""The micro-batch of this number: always the same for the same number."""


class Split(NamedTuple):
    """The cases of a training."""

    train: list[Case]
    validation: list[Case]


def split_cases(cases: Sequence[Case], training: Training) -> Split:
    """Sets validation cases aside; facts that are asked twice are kept once.

    Raises:
        InputError: fewer train cases than one batch takes.
    """
    unique = list({key: case for key, case in zip(case_keys(cases).tolist(), cases, strict=True)}.values())
    random.Random(f"{training.seed}/split").shuffle(unique)
    split = Split(unique[training.validation :], unique[: training.validation])
    if len(split.train) < training.batch_size:
        raise InputError(
            f"expected at least {training.batch_size + training.validation} different cases, a batch and those for "
            f"validation; got {len(unique)}: give more data, or lower batch_size or validation"
        )
    return split


def shuffle(cases: Sequence[Case], training: Training) -> Draw:
    """Micro-batches from passes over all cases, each in another order; what does not fill a batch is passed over."""
    each = len(cases) // training.batch_size  # batches of a pass

    @lru_cache(maxsize=1)
    def order(number: int) -> list[int]:
        return random.Random(f"{training.seed}/order/{number}").sample(range(len(cases)), len(cases))

    def draw(number: int) -> list[Case]:
        start = number % each * training.batch_size
        return [cases[i] for i in order(number // each)[start : start + training.batch_size]]

    return draw


def interleave(groups: Sequence[Sequence[Case]], training: Training) -> Draw:
    """Micro-batches to which the groups contribute one case after the other, however many each has."""
    draws = [shuffle(group, replace(training, batch_size=1)) for group in groups]

    def draw(number: int) -> list[Case]:
        numbers = range(number * training.batch_size, (number + 1) * training.batch_size)
        return [case for i in numbers for case in draws[i % len(draws)](i // len(draws))]

    return draw
