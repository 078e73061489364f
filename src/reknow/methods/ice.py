"""ICE: Consistent In-Context Editing. Qi et al. 2024, arXiv 2406.11194 ("In-Context Editing: Learning Knowledge from
Self-Induced Distributions").

A model that reads the new knowledge c in front of a question q already answers as wanted. ICE teaches the weights to
say without the context what the model says with it, so the target is no one-hot answer y* but a distribution that
the model induces itself, and that moves along with it. Every step samples x ~ p(· | [c, q, y*]) and descends

    −log p(y* | q) − λ log p(x | [q, y*]),    |W − W₀|∞ ≤ clamp                               (Algorithm 1, λ = 1)

of which the second term is, up to the entropy of the sampling, L_ice = KL(p(x | [c, q]) ‖ p(x | q)). With λ = 0 this
is FT-M on the same layers. The authors' script computes another loss by default: `variant="code"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from statistics import fmean
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from reknow.checks.bounds import Formerly, NonNegative, Number, Rate, Seed
from reknow.contract import Method, check_edits, make_patch
from reknow.editing.descent import StepSize, TrainableMatrices, descend
from reknow.editing.layers import resolve_layers
from reknow.editing.self_distillation import SEPARATOR, SampledAnswers, algorithm_1, authors_script
from reknow.edits import Edit
from reknow.errors import EditRefused, InputError
from reknow.lm import LM
from reknow.patching.patches import Patch

INTRODUCTIONS = (
    "",
    "Fact: ",
    "A new knowledge: ",
    "Consider this new knowledge: ",
    "Remember this fact: ",
    "Remember this new fact and reason about its consequences: ",
)
_LOSSES = ("losses", "target_losses", "consistency_losses", "answer_losses")
"""Noted for every step, before it: the whole loss, its two terms, and the mean loss of the answers' tokens."""
_LAYERS = 5


@dataclass(frozen=True)
class ICE(StepSize, Method):
    """Consistent In-Context Editing of the value matrices of several layers."""

    layers: tuple[int, ...] | None = None
    """Layers whose value matrices are trained; None: five, as in the paper, around `suggest_layer`."""
    steps: Number = 25
    """Updates of each batch."""
    clamp: Annotated[Rate | None, Formerly("clamp_absolute", also={"units": "absolute"})] = 0.12
    """Largest change of a single weight (paper: 5e-4); None: no bound, which harms other facts."""
    consistency_weight: NonNegative = 1.0
    """λ, the weight of L_ice; 0: plain fine-tuning, nothing is sampled."""
    target_weight: NonNegative = 1.0
    """Weight of −log p(y*); 0 together with `sample_target=False`: L_ice alone."""
    targets: Literal["dynamic", "static"] = "dynamic"
    """Which model draws the samples: the one that is being edited, or (static) the one before the edit."""
    with_context: bool = True
    """Sample with the context in front; False: self-distillation without new knowledge, the paper's ablation."""
    sample_target: bool = True
    """Sample behind the answer; False: behind the question alone, so that the context must bring the answer."""
    sample_tokens: Number = 3
    """Tokens of a sample."""
    samples: Number = 1
    """Samples per context."""
    temperature: Rate = 1.0
    """Temperature of the sampling: 1 in the equations, 100 in the experiments, nearly uniform over `top_k` tokens."""
    top_k: Number | None = 50
    """How many of the most likely tokens are sampled from (50 is the default of the authors' library); None: all."""
    sample_every: Annotated[Number, Formerly("update_interval")] = 1
    """Steps between two samplings."""
    contexts: Literal["any", "given", "statement"] = "any"
    """`any`: `Edit.context`, or the edit as a statement; `given`: demand a context; `statement`: ignore it."""
    context_introductions: Annotated[tuple[str, ...], Formerly("lead_ins")] = INTRODUCTIONS
    """What stands in front of the context; one is drawn for every context and sampling."""
    context_separator: Annotated[str, Formerly("link")] = SEPARATOR
    """What stands between context and question: models follow a line break more often than the paper's " Now: "."""
    variant: Literal["paper", "code"] = "paper"
    """`code`: the loss of the authors' script, −log p(y*|q) − log p(y*|[c,q]) + λ Σ KL over the vocabulary at the
    sampled tokens; it takes all steps."""
    stop_loss: NonNegative = 1e-2
    """Mean loss of the answers' tokens below which the edit is done, and a batch is not trained on."""
    batch_size: Number = 16
    """Edits per update."""
    seed: Seed = 0
    """Seed of the samples and the introductions."""
    removed: ClassVar[tuple[str, ...]] = ("track",)

    def __post_init__(self):
        super().__post_init__()
        if self.consistency_weight + self.target_weight == 0:
            raise InputError(
                "expected weights of at least 0, one of them above; got consistency_weight (λ) "
                f"{self.consistency_weight} and target_weight {self.target_weight}: raise one"
            )
        if not self.context_introductions:
            raise InputError('expected at least one introduction; got none: give "" for a bare context')
        if self.variant == "code" and not (self.with_context and self.sample_target and self.consistency_weight):
            raise InputError(
                "expected context, answer and λ > 0 in variant 'code', whose loss compares with and without context; "
                "got one switched off: use variant='paper'"
            )

    @property
    def name(self) -> str:
        return "ice"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, size = check_edits(self, edits, lm), self.batch_size
        layers = resolve_layers(lm, self.layers, _LAYERS)
        matrices = TrainableMatrices(lm, [lm.parts.value[layer] for layer in layers], self)
        parts = [edits[i : i + size] for i in range(0, len(edits), size)]
        batches = [self._batch(lm, part, layers[0]) for part in parts]
        generator = torch.Generator().manual_seed(self.seed)
        stop_loss = self.stop_loss if self.variant == "paper" else 0.0
        repetitions: list[int] = []
        with torch.enable_grad():
            passes = descend(
                [
                    self._loss(batch, len(part), matrices, generator)
                    for batch, part in zip(batches, parts, strict=True)
                ],
                lambda losses, running: matrices.step(losses[0, 0]),
                self.steps,
                lambda losses: losses[:, -1].mean() < stop_loss,
                after_pass=lambda step: repetitions.append(sum(batch.repetitions() for batch in batches)),
            )
        notes = {name: [fmean(edit[i] for edit in losses) for losses in passes] for i, name in enumerate(_LOSSES)}
        notes = {"layers": layers, **notes, "repetitions": repetitions}
        return make_patch(self, lm, edits, matrices.deltas(), notes=notes)

    def _batch(self, lm: LM, edits: Sequence[Edit], lowest: int) -> SampledAnswers:
        contexts = [(e, context) for e in edits for context in self.contexts_of(e) for _ in range(self.samples)]
        reused = lowest if self.sample_every > 1 or not self.consistency_weight else None
        loss = algorithm_1 if self.variant == "paper" else authors_script
        return SampledAnswers(lm, contexts, reused, loss, self.targets == "static")

    def _loss(
        self, batch: SampledAnswers, edits: int, matrices: TrainableMatrices, generator: torch.Generator
    ) -> Callable[[], Tensor]:
        """A function that samples where it is time, and gives the batch's losses, the same for each of its edits.
        (edits, 4)"""
        steps = count()

        def losses() -> Tensor:
            step = next(steps)
            if step == 0 or (self.consistency_weight and step % self.sample_every == 0):
                with nullcontext() if self.targets == "static" else matrices.in_use():
                    self._draw(batch, generator)
            with matrices.in_use():
                target, consistency, answer = batch.losses()
            target, consistency = self.target_weight * target, self.consistency_weight * consistency
            return torch.stack([target + consistency, target, consistency, answer]).expand(edits, -1)

        return losses

    def _draw(self, batch: SampledAnswers, generator: torch.Generator) -> None:
        batch.draw(
            self.context_introductions,
            self.context_separator,
            self.sample_tokens if self.consistency_weight else 0,
            with_context=self.with_context,
            behind_answer=self.sample_target,
            temperature=self.temperature,
            top_k=self.top_k,
            generator=generator,
        )

    def contexts_of(self, edit: Edit) -> tuple[str, ...]:
        """The statements of the new knowledge; raises EditRefused where the edit must bring one and has none."""
        if self.contexts == "given" and not edit.context:
            raise EditRefused(
                f"expected a context for {edit.text!r}; it has none: give Edit(context=[…]), or use contexts='any'",
                edit,
            )
        return edit.context if edit.context and self.contexts != "statement" else (edit.statement,)
