"""How a method that learns to edit is trained: what it is given, what it gives, what comes out."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

import reknow
from reknow.checks.bounds import Natural, Number, Rate, Seed, check
from reknow.edits import Case
from reknow.errors import EditFailed, InputError
from reknow.files.locks import write_lock
from reknow.files.rows import cases_digest, open_manifest
from reknow.learning.editors import EDITOR_FILE, Editor, case_keys
from reknow.learning.loop import CHECKPOINT_FILE, Loop
from reknow.model.readable import unreadable

if TYPE_CHECKING:
    from reknow.learning.learned import Learned
    from reknow.lm import LM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """How an editor is trained, whatever the method."""

    steps: Number = 2000
    """Updates at most."""
    batch_size: Number = 8
    """Cases of a micro-batch; what they mean to each other is the method's affair."""
    micro_batches: Number = 1
    """Micro-batches whose gradients make one update; a multiple of the number of processes."""
    warmup: Natural = 0
    """Updates in which the learning rates rise to their values."""
    decay: bool = False
    """Afterwards they fall linearly to nothing at the last step."""
    clip_norm: Rate | None = None
    """Largest norm of the gradient; None: any."""
    validation: Natural = 64
    """Cases set aside to choose the best editor by; 0: the last one is taken."""
    validate_every: Number = 200
    """Updates between two validations."""
    patience: Number = 10
    """Validations without a lower loss after which the training ends."""
    checkpoint_every: Number = 200
    """Updates between two checkpoints."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision."""
    seed: Seed = 0
    """Of everything that is drawn by chance."""
    tensorboard: bool = False
    """Also write the losses for TensorBoard."""

    def __post_init__(self):
        check(self)


class Learner(Protocol):
    """What a method gives to the loop."""

    @property
    def module(self) -> nn.Module:
        """All that is learned and kept: parameters, and statistics as buffers. On the base model's device."""
        ...

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the module's parameters, with the paper's learning rates."""
        ...

    def loss(self, batch: Sequence[Case], chance: random.Random) -> tuple[Tensor, dict[str, float]]:
        """The scalar whose gradient is followed, and the paper's losses by name, to show.

        All choices come from `chance`; torch's own random state may be used too, it is seeded for the call.
        """
        ...

    def validate(self, cases: Sequence[Case]) -> dict[str, float]:
        """Measures on cases set aside; the editor with the lowest `loss` is kept. May adapt the module's buffers."""
        ...


Draw = Callable[[int], Sequence[Case]]
"""The micro-batch of this number: always the same for the same number."""


def readable(lm: LM, cases: Sequence[Case]) -> list[Case]:
    """The cases without those that are too long for the model, which are logged: one would end a training midway."""
    reasons = unreadable(lm, cases)
    found = [(case.edit, reason) for case, reason in zip(cases, reasons, strict=True) if reason is not None]
    if found:
        edit, reason = found[0]
        logger.warning(
            "%d of %d cases left out; the first: %s, %s", len(found), len(cases), edit.id or edit.text, reason
        )
    return [case for case, reason in zip(cases, reasons, strict=True) if reason is None]


def split(cases: Sequence[Case], training: Training) -> tuple[list[Case], list[Case]]:
    """(cases to learn from, cases set aside for validation); facts that are asked twice are kept once.

    Raises:
        InputError: fewer cases to learn from than one batch takes.
    """
    unique = list({key: case for key, case in zip(case_keys(cases).tolist(), cases, strict=True)}.values())
    random.Random(f"{training.seed}/split").shuffle(unique)
    held, learning = unique[: training.validation], unique[training.validation :]
    if len(learning) < training.batch_size:
        raise InputError(
            f"expected at least {training.batch_size + training.validation} different cases, a batch and those for "
            f"validation; got {len(unique)}: give more data, or lower batch_size or validation"
        )
    return learning, held


def shuffled(cases: Sequence[Case], training: Training) -> Draw:
    """Micro-batches from passes over all cases, each in another order; what does not fill a batch is passed over."""
    each = len(cases) // training.batch_size  # batches of a pass

    @lru_cache(maxsize=1)
    def order(number: int) -> list[int]:
        return random.Random(f"{training.seed}/order/{number}").sample(range(len(cases)), len(cases))

    def draw(number: int) -> list[Case]:
        start = number % each * training.batch_size
        return [cases[i] for i in order(number // each)[start : start + training.batch_size]]

    return draw


def in_turn(groups: Sequence[Sequence[Case]], training: Training) -> Draw:
    """Micro-batches to which the groups contribute one case after the other, however many each has."""
    draws = [shuffled(group, replace(training, batch_size=1)) for group in groups]

    def draw(number: int) -> list[Case]:
        places = range(number * training.batch_size, (number + 1) * training.batch_size)
        return [case for at in places for case in draws[at % len(draws)](at // len(draws))]

    return draw


def train(
    method: Learned,
    lm: LM,
    learner: Learner,
    learning: Sequence[Case],
    held: Sequence[Case],
    out: str | Path,
    training: Training,
    draw: Draw,
    progress: bool = False,
) -> str:
    """Trains and writes the editor; the same call on the same folder goes on where a killed one was.

    The folder has `editor.safetensors` (the best editor, when the training has ended), `checkpoint.safetensors`
    (until then), `log.jsonl` (the losses) and `manifest.json` (what was asked for).

    Args:
        learning, held: cases to learn from and to validate on, from `split`.
        draw: which cases make which micro-batch.

    Returns:
        The path of the editor.

    Raises:
        InputError: the folder was started with other arguments, another process trains there, or micro-batches that
            the processes cannot share.
        EditFailed: a loss that is no number; the last checkpoint is as it was.
    """
    folder = Path(out)
    run = Loop(lm, learner, draw, held, folder, training)
    path = folder / EDITOR_FILE
    with write_lock(folder) if run.main else nullcontext():
        if run.main:
            settings = {
                "reknow": reknow.__version__,
                "model": lm.fingerprint.digest,
                "method": {"name": method.name, **asdict(method)},  # type: ignore[call-overload]
                "training": {**asdict(training), "tensorboard": None},
                "cases": len(learning) + len(held),
                "cases_digest": cases_digest([*learning, *held]),
            }
            open_manifest(folder, settings, {"model": lm.name})
        run.accelerator.wait_for_everyone()
        if not path.exists():
            with lm.unpatched(), torch.enable_grad():
                notes = run.all(progress)
            if not run.best:
                raise EditFailed("expected a validation loss that is a number; got none: lower the learning rate")
            if run.main:
                settings = json.loads(json.dumps(asdict(method) | {"editor": None}))  # type: ignore[call-overload]
                seen = case_keys([*learning, *held])
                Editor(method.name, settings, run.best, lm.fingerprint, seen, notes).save(path)
                (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
            run.accelerator.wait_for_everyone()
    return str(path)
