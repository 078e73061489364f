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

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from torch import Tensor

from reknow.checks.bounds import Formerly, Number, Rate, Seed, Units, Weight
from reknow.contract import Method, checked, weights_patch
from reknow.editing.descent import Matrices, Pace, Scored, predicted, sample
from reknow.editing.layers import resolve_layers
from reknow.edits import Edit
from reknow.errors import EditRefused, InputError
from reknow.model.exact import finite_loss
from reknow.model.scoring import kl_divergence
from reknow.model.tokens import Row, Text
from reknow.patching.patches import Patch
from reknow.progress import told
from reknow.texts.writing import prepend

if TYPE_CHECKING:
    from reknow.lm import LM

LEAD_INS = (
    "",
    "Fact: ",
    "A new knowledge: ",
    "Consider this new knowledge: ",
    "Remember this fact: ",
    "Remember this new fact and reason about its consequences: ",
)
"""What introduces the context; one is drawn for every row and step."""

LOSSES = ("losses", "target_losses", "consistency_losses", "answer_losses")
"""Noted for every step, before it: whole, its two terms, and the answer's tokens by themselves."""

LAYERS = 5
ABSOLUTE = {"units": "absolute"}

Targets = Literal["dynamic", "static"]
Contexts = Literal["any", "given", "statement"]
Variant = Literal["paper", "code"]


@dataclass(frozen=True)
class ICE(Method):
    """Consistent In-Context Editing of the value matrices of several layers."""

    layers: tuple[int, ...] | None = None
    """Layers whose value matrices are trained; None: five, as in the paper, around `suggest_layer`."""
    steps: Number = 25
    """Updates of each batch."""
    learning_rate: Annotated[Rate, Formerly("learning_rate_absolute", also=ABSOLUTE)] = 0.01
    """Step size of Adam (paper: 7e-4)."""
    clamp: Annotated[Weight | None, Formerly("clamp_absolute", also=ABSOLUTE)] = 0.12
    """Largest change of a single weight (paper: 5e-4); None: no bound, which harms other facts."""
    units: Units = "relative"
    """`relative`: learning rate and clamp are multiples of the matrix's root mean square, so that they mean the same
    in every model; `absolute`: they are numbers, as in the paper, and both must be given."""
    consistency_weight: Weight = 1.0
    """λ, weight of L_ice; 0: plain fine-tuning, nothing is sampled."""
    target_weight: Weight = 1.0
    """Weight of L_ft, the answer itself; 0 together with `sample_target=False`: L_ice alone."""
    targets: Targets = "dynamic"
    """Sample from the model as it is at each step, or (static) from the model before the edit."""
    with_context: bool = True
    """Sample with the context in front; False: self-distillation without new knowledge, the paper's ablation."""
    sample_target: bool = True
    """Sample behind the answer; False: behind the question alone, so that the context must bring the answer."""
    sample_tokens: Number = 3
    """Length of a sample."""
    samples: Number = 1
    """Samples per context."""
    temperature: Rate = 1.0
    """Of the sampling; 1 is that of the equations, 100 of the experiments: nearly uniform over the `top_k` tokens."""
    top_k: Number | None = 50
    """Likeliest tokens to sample from; None: all. (The authors' 50 is a default of their library.)"""
    sample_every: Annotated[Number, Formerly("update_interval")] = 1
    """Steps between two samplings."""
    contexts: Contexts = "any"
    """`any`: `Edit.context`, or the edit as a statement; `given`: demand a context; `statement`: ignore it."""
    context_introductions: Annotated[tuple[str, ...], Formerly("lead_ins")] = LEAD_INS
    """What introduces the context."""
    context_separator: Annotated[str, Formerly("link")] = " Now: "
    """What stands between context and question."""
    variant: Variant = "paper"
    """`code`: −log p(y*|q) − log p(y*|[c,q]) + λ Σ KL over the vocabulary at the sampled tokens, as the script."""
    stop_loss: Weight = 1e-2
    """End when the answer's own mean loss is below; a batch below is not trained on. Only in the paper's variant."""
    batch_size: Number = 16
    """Edits per update."""
    seed: Seed = 0
    """Of the samples and the lead-ins."""
    removed: ClassVar[tuple[str, ...]] = ("track",)
    """Settings of earlier versions that mean nothing any more."""

    def __post_init__(self):
        super().__post_init__()
        if self.consistency_weight + self.target_weight == 0:
            raise InputError(
                "expected weights of at least 0, one of them above; got consistency_weight (λ) "
                f"{self.consistency_weight} and target_weight {self.target_weight}: raise one"
            )
        if not self.context_introductions:
            raise InputError('expected at least one lead-in; got none: give "" for a bare context')
        if self.variant == "code" and not (self.with_context and self.sample_target and self.consistency_weight):
            raise InputError(
                "expected context, answer and λ > 0 in variant 'code', whose loss compares with and without context; "
                "got one switched off: use variant='paper'"
            )

    @property
    def name(self) -> str:
        return "ice"

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = checked(self, edits)
        layers = resolve_layers(lm, self.layers, LAYERS)
        names = [lm.parts.value[layer] for layer in layers]
        absolute = self.units == "absolute"
        pace = Pace(
            self.learning_rate,
            learning_rate_absolute=self.learning_rate if absolute else None,
            clamp=None if absolute else self.clamp,
            clamp_absolute=self.clamp if absolute else None,
        )
        matrices = Matrices(lm, names, pace)
        generator = torch.Generator().manual_seed(self.seed)
        size = self.batch_size
        batches = [_Batch(lm, self, edits[i : i + size], layers[0], generator) for i in range(0, len(edits), size)]
        steps = self._descend(lm, batches, matrices)
        notes = {"layers": layers, **{key: [step[key] for step in steps] for key in steps[0]}}
        return weights_patch(self, lm, edits, matrices.deltas(), notes=notes)

    def _descend(self, lm: LM, batches: list[_Batch], matrices: Matrices) -> list[dict]:
        """What happened at each step: losses as means over the edits, repetitions as a sum."""
        steps: list[dict] = []
        count = sum(len(batch.edits) for batch in batches)
        for step in range(self.steps):
            found = [batch.update(step, matrices) for batch in batches]
            steps.append({key: sum(part[key] for part in found) for key in found[0]})
            for key in LOSSES:
                steps[-1][key] /= count
            told(step, self.steps, steps[-1]["losses"])
            if self.variant == "paper" and steps[-1]["answer_losses"] < self.stop_loss:
                break
        return steps

    def contexts_of(self, edit: Edit) -> tuple[str, ...]:
        """The statements of the new knowledge; raises EditRefused where the edit must bring one and has none."""
        if self.contexts == "given" and not edit.context:
            raise EditRefused(
                f"expected a context for {edit.text!r}; it has none: give Edit(context=[…]), or use contexts='any'",
                edit,
            )
        return edit.context if edit.context and self.contexts != "statement" else (edit.statement,)


def informed(edit: Edit, context: str, lead_in: str = "", separator: str = " Now: ") -> Text:
    """The question with the new knowledge in front: `Fact: Peru is in Asia. Now: Peru is in`."""
    return Text.asked(edit, prepend(f"{lead_in}{context.strip()}{separator}", edit.text))


class _Batch:
    """Some edits, the samples in use for them, and the loss.

    A unit is one sample: (edit, context, number of the sample). Its scored places are the answer's tokens, then the
    sample's.
    """

    def __init__(self, lm: LM, method: ICE, edits: Sequence[Edit], lowest: int, generator: torch.Generator):
        self.lm, self.method, self.edits, self.generator = lm, method, edits, generator
        self._reused = lowest if method.sample_every > 1 or not method.consistency_weight else None
        self._units = [
            (e, context) for e in edits for context in method.contexts_of(e) for _ in range(method.samples)
        ]
        self._plain = lm.encode([Text.asked(edit) for edit, _ in self._units])
        self._samples: list[tuple[int, ...]] = [()] * len(self._units)
        self._bare: Scored  # without context
        self._full: Scored  # with context, where the code's variant reads it
        self._fixed: Tensor | None = None  # (n, vocabulary) log-probabilities with context, static targets
        self._answer: Tensor  # (n,) whether a place belongs to the answer
        self._weights: Tensor  # (n,)

    def update(self, step: int, matrices: Matrices) -> dict:
        """Samples where it is time, takes one step, and tells the losses before it, summed over the edits."""
        method = self.method
        if step % method.sample_every == 0 and (method.consistency_weight or step == 0):
            with nullcontext() if method.targets == "static" else matrices.in_use():
                self._draw()
        with matrices.in_use(), torch.enable_grad():
            target, consistency, answer = self._terms()
            value = finite_loss(target + consistency)
            if answer >= method.stop_loss or method.variant == "code":
                matrices.step(target + consistency)
        losses = (value, float(target.detach()), float(consistency.detach()), answer)
        summed = {key: loss * len(self.edits) for key, loss in zip(LOSSES, losses, strict=True)}
        return summed | {"repetitions": self._repetitions()}

    def _draw(self) -> None:
        """New samples from the model in use, and the rows that they are scored in."""
        method, lm = self.method, self.lm
        chosen = torch.randint(
            len(method.context_introductions), (len(self._units),), generator=self.generator
        ).tolist()
        texts = [
            informed(*unit, method.context_introductions[i], method.context_separator)
            for unit, i in zip(self._units, chosen, strict=True)
        ]
        # The answer's tokens are those of the bare row, so that both sides are scored at the same places.
        full = [
            Row(row.ids[: row.prompt_length] + plain.target_ids, row.prompt_length)
            for row, plain in zip(lm.encode(texts), self._plain, strict=True)
        ]
        if method.consistency_weight:
            source = full if method.with_context else self._plain
            source = source if method.sample_target else [_question(row) for row in source]
            self._samples = sample(
                lm,
                source,
                method.sample_tokens,
                temperature=method.temperature,
                top_k=method.top_k,
                generator=self.generator,
            )
        self._place()
        if method.variant == "code":
            self._full = self._scored([_longer(row, x) for row, x in zip(full, self._samples, strict=True)])
            if method.targets == "static":
                with torch.no_grad():
                    self._fixed = self._full.log_probs()

    def _place(self) -> None:
        """The rows without context, one per unit, or two where the sample does not stand behind the answer."""
        rows: list[Row] = []
        answer: list[bool] = []
        weights: list[float] = []
        for plain, drawn in zip(self._plain, self._samples, strict=True):
            behind = self.method.sample_target or not drawn
            rows += [_longer(plain, drawn)] if behind else [plain, _longer(_question(plain), drawn)]
            places = len(plain.target_ids) + len(drawn)
            answer += [i < len(plain.target_ids) for i in range(places)]
            # The script sums over tokens, Algorithm 1's loss is a mean.
            weights += [(1.0 if self.method.variant == "code" else 1 / places) / len(self._units)] * places
        self._bare = self._scored(rows)
        self._answer = torch.tensor(answer, device=self.lm.device)
        self._weights = torch.tensor(weights, device=self.lm.device)

    def _scored(self, rows: list[Row]) -> Scored:
        return Scored(self.lm, rows, [predicted(row, row.prompt_length) for row in rows], self._reused)

    def _terms(self) -> tuple[Tensor, Tensor, float]:
        """(weighted L_ft, λ L_ice, mean loss of the answer's tokens), with the weights as they are now."""
        method, answer = self.method, self._answer
        if method.variant == "code":
            alone = self._bare.log_probs()
            aware = self._full.log_probs() if self._fixed is None else self._fixed
            chosen = self._bare.targets[answer, None]
            first = -(alone[answer].gather(1, chosen) + aware[answer].gather(1, chosen))[:, 0]
            second = kl_divergence(aware[~answer].detach(), alone[~answer])
        else:
            nll = self._bare.nll()
            first, second = nll[answer], nll[~answer]
        target = method.target_weight * (first * self._weights[answer]).sum()
        consistency = method.consistency_weight * (second * self._weights[~answer]).sum()
        mean = (first.detach() * self._weights[answer]).sum() / self._weights[answer].sum()
        return target, consistency, float(mean)

    def _repetitions(self) -> int:
        """How many sampled tokens repeat one of the answer, or of their own sample before them."""
        behind = [(*row.target_ids, *x) for row, x in zip(self._plain, self._samples, strict=True)]
        fresh = [len(set(tokens) - set(row.target_ids)) for tokens, row in zip(behind, self._plain, strict=True)]
        return sum(len(x) - new for x, new in zip(self._samples, fresh, strict=True))


def _longer(row: Row, tokens: Sequence[int]) -> Row:
    return Row((*row.ids, *tokens), row.prompt_length)


def _question(row: Row) -> Row:
    return Row(row.ids[: row.prompt_length], row.prompt_length)


@torch.no_grad()
def consistency(
    lm: LM,
    edits: Sequence[Edit],
    *,
    contexts: Contexts = "any",
    context_introductions: Sequence[str] = LEAD_INS,
    context_separator: str = " Now: ",
) -> list[float]:
    """How far the model is from the consistency condition p(x | [c, q]) = p(x | q), which an edit should establish.

    Returns:
        Per edit KL(p(· | [c, q]) ‖ p(· | q)) in nats, a mean over the tokens of the new answer and the one behind it,
        over the edit's contexts and over the lead-ins.
    """
    method, found = ICE(contexts=contexts), []
    for edit in edits:
        (plain,) = lm.encode([Text.asked(edit)])
        texts = [
            informed(edit, context, lead_in, context_separator)
            for context in method.contexts_of(edit)
            for lead_in in context_introductions
        ]
        full = [_longer(_question(row), plain.target_ids) for row in lm.encode(texts)]
        aware = _behind(lm, full).unflatten(0, (len(full), -1))
        found.append(float(kl_divergence(aware, _behind(lm, [plain])).mean()))
    return found


def _behind(lm: LM, rows: Sequence[Row]) -> Tensor:
    """Log-probabilities at the answer's tokens and at the one behind it, row by row. (n, vocabulary)"""
    places = [[*predicted(row, row.prompt_length), (len(row.ids) - 1, 0)] for row in rows]
    return Scored(lm, rows, places, None).log_probs()


@torch.no_grad()
def likeliest(lm: LM, edit: Edit, context: str, count: int = 6) -> dict[str, list[str]]:
    """The tokens that the model finds likeliest behind the new answer, `with` the context in front and `without`."""
    found = {}
    for name, text in (("with", informed(edit, context)), ("without", Text.asked(edit))):
        top = _behind(lm, lm.encode([text]))[-1].topk(count).indices
        found[name] = [lm.tokenizer.decode(token) for token in top]
    return found
