"""The loop in which every method that learns to edit is trained: updates, validation, checkpoints.

Resumable to the bit: whatever is drawn at random (the order of the cases, which paraphrase, dropout) is a function of
the seed and of how many batches came before, so that a checkpoint needs no random state, and a run that was killed
goes on as if nothing had happened. Distributed by Accelerate: the micro-batches of an update are shared out among the
processes and their gradients averaged, so the number of processes changes the sums' last digits only.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, broadcast_object_list
from pydantic import JsonValue
from torch import Tensor

from reknow.edits import FROM_FILES, Case
from reknow.errors import EditFailed, InputError, MissingExtra
from reknow.files.json_lines import Rows
from reknow.files.schema import Count, FormatError, Strict, explain
from reknow.files.tensors import read_tensors, write_tensors
from reknow.learning.editors import check_like
from reknow.learning.training import Draw, Learner, Training
from reknow.lm import LM
from reknow.progress import progress

__all__ = ["CHECKPOINT_FILE", "LOG_FILE", "Loop", "seeded"]

CHECKPOINT_FILE, LOG_FILE = "checkpoint.safetensors", "log.jsonl"


@contextmanager
def seeded(*parts: object, device: torch.device | str = "cpu"):
    """While open, torch's random state depends on the parts alone; gives Python's for the same parts."""
    rng = random.Random("/".join(map(str, parts)))
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(rng.getrandbits(63))
        yield rng


@dataclass
class _State:
    """Where a run stands, besides parameters and optimizer."""

    __pydantic_config__ = FROM_FILES

    step: Count = 0
    best: float | None = None
    best_step: Count = 0
    best_stats: dict[str, float | None] = field(default_factory=dict)
    waited: Count = 0
    """Validations since the best one."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sums of the losses since the last row of the log."""


class _Header(Strict):
    """The JSON text of a checkpoint; older ones have the optimizer's groups too, which the settings give."""

    state: _State
    scaler: dict[str, float] | None = None
    groups: list[dict[str, JsonValue]] | None = None


class Loop:
    """One training: the loop and what it keeps."""

    def __init__(
        self,
        lm: LM,
        learner: Learner,
        draw: Draw,
        validation_cases: Sequence[Case],
        folder: Path,
        training: Training,
    ):
        if training.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise MissingExtra("tensorboard", "train", "logging for TensorBoard")
        if training.precision == "fp16" and lm.device.type == "cpu":
            raise InputError("expected a precision that the CPU has, which is no or bf16; got fp16: choose one")
        # Accelerate remembers the precision of an earlier training in this process, and refuses another one.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=training.precision,
            cpu=lm.device.type == "cpu",
            log_with="tensorboard" if training.tensorboard else None,
            project_dir=str(folder),
        )
        self.main, self.processes = self.accelerator.is_main_process, self.accelerator.num_processes
        if training.micro_batches % self.processes:
            raise InputError(
                f"expected micro_batches that {self.processes} processes can share; got {training.micro_batches}: "
                f"set micro_batches to a multiple of {self.processes}"
            )
        self.lm, self.learner, self.draw, self.validation_cases = lm, learner, draw, validation_cases
        self.folder, self.training, self.state = folder, training, _State()
        self.parameters = [p for p in learner.module.parameters() if p.requires_grad]
        self.optimizer = self.accelerator.prepare_optimizer(learner.optimizer(), device_placement=False)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.best: dict[str, Tensor] = {}
        self.log = Rows(None, ("step",))

    def run(self) -> dict[str, Any]:
        """Runs to the end; returns the notes of the editor."""
        if self.main:
            self.log = Rows(self.folder / LOG_FILE, ("step",))
        self._resume()
        training, state = self.training, self.state
        if training.tensorboard:
            self.accelerator.init_trackers("")
        with _smoothed(training.steps, state.step) as advance:
            while state.step < training.steps and state.waited < training.patience:
                losses = self._update()
                for name, value in losses.items():
                    state.sums[name] = state.sums.get(name, 0.0) + value
                state.step += 1
                last = state.step == training.steps
                if last or state.step % training.validate_every == 0:
                    self._validate()
                if state.step % training.checkpoint_every == 0 and not last:
                    self._save()
                advance(losses)
        if training.tensorboard:
            self.accelerator.end_training()
        return {
            "steps": state.step,
            "best_step": state.best_step,
            "validation": state.best_stats,
            "log": list(self.log.values()),
        }

    def _update(self) -> dict[str, float]:
        """One step of the optimizer; the losses, averaged over its micro-batches."""
        training, state = self.training, self.state
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * _rate_factor(state.step, training)
        self.optimizer.zero_grad()
        sums: dict[str, float] = {}
        share = range(self.accelerator.process_index, training.micro_batches, self.processes)
        for micro in share:
            number = state.step * training.micro_batches + micro
            with seeded(training.seed, "batch", number, device=self.lm.device) as rng, self.accelerator.autocast():
                loss, shown = self.learner.loss(self.draw(number), rng)
            if not math.isfinite(loss.item()):
                raise EditFailed(
                    f"expected losses that are numbers; got {loss.item()} at step {state.step}: lower the learning "
                    "rate; the last checkpoint is as it was"
                )
            self.accelerator.backward(loss / len(share))
            for name, value in shown.items():
                sums[name] = sums.get(name, 0.0) + value / len(share)
        if self.processes > 1:
            self._average()
        if training.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.parameters, training.clip_norm)
        self.optimizer.step()
        self._share_buffers()
        return sums

    def _average(self) -> None:
        """The gradients' mean over the processes."""
        for parameter in self.parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            reduced = self.accelerator.reduce(gradient, "mean")
            assert isinstance(reduced, Tensor)
            parameter.grad = reduced

    def _share_buffers(self) -> None:
        """Statistics are those of the first process."""
        if self.processes > 1:
            for buffer in self.learner.module.buffers():
                buffer.copy_(broadcast(buffer))

    def _validate(self) -> None:
        """Reads the validation cases, keeps the module if it is the best so far, and writes a row of the log."""
        state = self.state
        measured = [{}]
        if self.main and self.validation_cases:
            with seeded(self.training.seed, "validation", device=self.lm.device), self.accelerator.autocast():
                measured = [self.learner.validate(self.validation_cases)]
        if self.processes > 1:
            broadcast_object_list(measured)
        self._share_buffers()
        # JSON has no NaN.
        stats = {name: value if math.isfinite(value) else None for name, value in measured[0].items()}
        loss = stats.get("loss")
        better = "loss" not in stats or (loss is not None and (state.best is None or loss < state.best))
        if better:
            state.best, state.best_step, state.best_stats, state.waited = loss, state.step, stats, 0
            self.best = {n: t.detach().clone() for n, t in self.learner.module.state_dict().items()}
        else:
            state.waited += 1
        steps = state.step - max((step for (step,) in self.log if step < state.step), default=0)
        row = {name: value / steps for name, value in state.sums.items()}
        row |= {f"validation {name}": value for name, value in stats.items()}
        self.log.add({"step": state.step, **row})
        state.sums = {}
        if self.training.tensorboard:
            self.accelerator.log({name: value for name, value in row.items() if value is not None}, step=state.step)

    # --- checkpoints -------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Everything that the next step depends on, as one file."""
        if not self.main:
            return
        optimizer = self.optimizer.state_dict()
        named = {f"module.{n}": t for n, t in self.learner.module.state_dict().items()}
        named |= {f"best.{n}": t for n, t in self.best.items()}
        for i, values in optimizer["state"].items():
            named |= {f"optimizer.{i}.{name}": torch.as_tensor(v) for name, v in values.items() if v is not None}
        scaler = self.accelerator.scaler
        header = {"state": asdict(self.state), "scaler": scaler.state_dict() if scaler is not None else None}
        write_tensors(self.folder / CHECKPOINT_FILE, named, header=header)

    def _resume(self) -> None:
        """Takes up the checkpoint, if there is one."""
        path = self.folder / CHECKPOINT_FILE
        if not path.exists():
            return
        try:
            sealed = read_tensors(path)
            header = sealed.header(_Header)
            module = self.learner.module.state_dict()
            for part in ("module", "best") if header.state.best_step else ("module",):
                check_like(f"tensor {part}.", _below(sealed.tensors, part), module)
            optimizer = self._moments(_below(sealed.tensors, "optimizer"))
        except (OSError, FormatError) as error:
            raise InputError(
                f"expected a checkpoint of this training at {path}; it is none ({explain(error)}): delete it to "
                "start anew"
            ) from error
        self.learner.module.load_state_dict(_below(sealed.tensors, "module"))
        self.best = {n: t.to(self.lm.device) for n, t in _below(sealed.tensors, "best").items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": optimizer})
        if self.accelerator.scaler is not None and header.scaler is not None:
            self.accelerator.scaler.load_state_dict(header.scaler)
        self.state = header.state

    def _moments(self, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """What the optimizer keeps of each parameter, by the parameter's number.

        Raises:
            FormatError: there is no such parameter, or it is of another shape.
        """
        order = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        numbers = {str(number): number for number in range(len(order))}
        found: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            if number not in numbers or tensor.shape not in (order[numbers[number]].shape, ()):
                raise FormatError(f"tensor optimizer.{key}: there is no such parameter, or it is of another shape")
            found.setdefault(numbers[number], {})[name] = tensor
        kinds = {tuple(sorted((n, t.dim() and 1) for n, t in found[i].items())) for i in found if order[i].dim()}
        if len(kinds) > 1 or len({tuple(sorted(of)) for of in found.values()}) > 1:
            raise FormatError("the optimizer keeps not the same of every parameter")
        return found


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix.`, by the rest."""
    return {n.removeprefix(f"{prefix}."): t for n, t in tensors.items() if n.startswith(f"{prefix}.")}


def _rate_factor(step: int, training: Training) -> float:
    """How much of its learning rate a step gets."""
    if step < training.warmup:
        return (step + 1) / training.warmup
    return (training.steps - step) / (training.steps - training.warmup) if training.decay else 1.0


@contextmanager
def _smoothed(total: int, done: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A stage of so many steps; gives the function that reports one more, with the losses, smoothed."""
    with progress.stage("training", total, unit="steps", done=done) as move:
        smooth: dict[str, float] = {}

        def advance(losses: Mapping[str, float]) -> None:
            for name, value in losses.items():
                smooth[name] = 0.95 * smooth.get(name, value) + 0.05 * value
            progress.note(", ".join(f"{name} {value:.3f}" for name, value in smooth.items()))
            move()

        yield advance
