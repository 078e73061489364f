"""Causal tracing: which states carry a fact. Meng, Bau, Andonian, Belinkov 2022 (ROME), arXiv 2202.05262, §2.

The model reads a prompt whose answer it knows (clean run), then with Gaussian noise on the embeddings of the
subject's tokens (corrupted run), then again so with one state put back to its clean value (restored run):

    indirect effect of a state = P(answer | restored) − P(answer | corrupted)
    total effect               = P(answer | clean)    − P(answer | corrupted)

`answer` is the first token that the clean run gives; but a number or a character of several tokens is taken whole:
the space before it says nothing and its first digit little. Probabilities are means over the noise samples, the same
noise in every run. σ = 3 × the standard deviation of the embeddings of all subjects' tokens, one number for all
dimensions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from reknow.checks.arguments import typed
from reknow.checks.bounds import Number, Rate, Seed, check_settings
from reknow.datasets.facts import Fact
from reknow.errors import InputError
from reknow.files.schema import Count, Listed, Strict
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.exclusive import typed_exclusively
from reknow.model.generation import decode
from reknow.model.parts import embedding_matrix
from reknow.model.tokens import EncodedText, Text
from reknow.progress import progress
from reknow.texts.templates import fill, split_template
from reknow.tracing.known import known_facts
from reknow.tracing.restoration import Prompt, RestorationKind, list_restorations

_log = logging.getLogger(__name__)

PARTIAL_CHARACTER = "\ufffd"
"""What a tokenizer shows of bytes that are no whole character."""

MOST_ANSWER_TOKENS = 16
"""Tokens that such an answer may have."""

TOKEN_CLASSES = (
    "First subject token",
    "Middle subject tokens",
    "Last subject token",
    "First subsequent token",
    "Further tokens",
    "Last token",
)
"""The rows of the paper's averages; the first token of a one-token subject is its last one too."""


_Probability = Annotated[float, Field(ge=0, le=1.001)]
"""A probability, rounded."""


@dataclass(frozen=True)
class Tracing:
    """How prompts are traced; defaults are the paper's, but for the window."""

    samples: Number = 10
    """Noise samples per prompt."""
    noise: Rate = 3.0
    """σ of the noise, in standard deviations of the embeddings of subjects' tokens."""
    window: Number | None = None
    """Layers restored together for MLP and attention: [l − window/2, l + window/2 − 1]. The paper takes 10 of
    GPT-2 XL's 48; None: the same share of this model's layers."""
    kinds: tuple[RestorationKind, ...] = ("hidden", "mlp", "attention")
    """What is restored; `mlp_severed` and `attention_severed` restore a block's output while the token's MLP or
    attention stays corrupted in all layers."""
    tokens: Literal["all", "classes", "subject_last"] = "all"
    """Where states are restored. `classes`: at one token of each class of `TOKEN_CLASSES`, the middle one, all
    that averages need; it spares most of the work on long prompts."""
    seed: Seed = 0
    """Seed of the noise; every prompt starts from it."""

    def __post_init__(self):
        check_settings(self)
        if not self.kinds:
            raise InputError(
                f"expected kinds among {', '.join(get_args(RestorationKind))}; got none: choose from these"
            )

    def window_of(self, layers: int) -> int:
        """The window for a model of so many layers."""
        return max(1, round(layers * 10 / 48)) if self.window is None else self.window


@dataclass(frozen=True, eq=False)
class Trace:
    """What one prompt showed."""

    prompt: str
    tokens: tuple[str, ...]
    """The prompt's tokens as text, special ones included."""
    subject: tuple[int, int]
    """The subject's first token and the one behind its last."""
    answer: str
    """The text whose probability is traced: a token, or a number or character of several."""
    clean: float
    """The answer's probability in the clean run."""
    corrupted: float
    """The answer's mean probability in the corrupted runs."""
    restored: dict[RestorationKind, Tensor]
    """The answer's mean probability in the restored runs. (tokens, layers), NaN where not traced."""
    window: int
    """Layers restored together for MLP and attention."""

    def effects(self, kind: RestorationKind) -> Tensor:
        """Indirect effects. (tokens, layers)"""
        return self.restored[kind] - self.corrupted

    def as_json(self) -> dict:
        """JSON values; `StoredTrace` reads them."""
        tables = {kind: [[None if math.isnan(p) else round(p, 7) for p in row] for row in table.tolist()]
                  for kind, table in self.restored.items()}  # fmt: skip
        return {**vars(self), "restored": tables}


class StoredTrace(Strict):
    """A `Trace` as JSON."""

    prompt: str
    tokens: Listed[str]
    subject: Annotated[list[Count], Field(min_length=2, max_length=2)]
    answer: str
    clean: _Probability
    corrupted: _Probability
    restored: dict[RestorationKind, Listed[Listed[_Probability | None]]]
    window: Count

    @model_validator(mode="after")
    def _fits(self) -> StoredTrace:
        first, behind = self.subject
        if not 0 <= first < behind <= len(self.tokens):
            raise ValueError(f"expected a subject among the {len(self.tokens)} tokens; got {self.subject}")
        widths = {len(row) for table in self.restored.values() for row in table}
        if any(len(table) != len(self.tokens) for table in self.restored.values()) or len(widths) > 1:
            raise ValueError("expected a row for each token, with a number for each layer")
        return self

    def trace(self) -> Trace:
        tables = {kind: torch.tensor([[math.nan if p is None else p for p in row] for row in table])
                  for kind, table in self.restored.items()}  # fmt: skip
        lists = {"tokens": tuple(self.tokens), "subject": tuple(self.subject), "restored": tables}
        return Trace(**{**self.model_dump(exclude={"restored"}), **lists})


@typed_exclusively
def embedding_std(lm: LM, facts: Sequence[Fact]) -> float:
    """Standard deviation, over all dimensions, of the embeddings of all subjects' tokens as the prompts have them."""
    if not facts:
        raise InputError("expected at least one fact to take the noise level from; got none: give facts")
    rows = lm.encode([Text.of(fact.prompt, fact.subject) for fact in facts])
    tokens = [token for row in rows for token in row.ids[row.subject_first : row.subject_last + 1]]  # type: ignore[operator]
    embedded = lm.model.get_input_embeddings()(torch.tensor([tokens], device=lm.device))  # (1, tokens, embedding)
    return float(embedded.float().std())


@typed_exclusively
def trace_prompt(lm: LM, prompt: str, subject: str, std: float, settings: Tracing | None = None) -> Trace:
    """The trace of one prompt, towards whatever the model answers; patches stay as they are.

    Args:
        prompt: with `{}` for the subject.
        std: of the embeddings of subjects' tokens, see `embedding_std`.
    """
    if len(split_template(prompt)) != 2 or not subject.strip():
        raise InputError(
            f"expected a prompt with one {{}} and a subject; got {prompt!r} and {subject!r}: mark the place"
        )
    (row,) = lm.encode([Text.of(prompt, subject)])
    lm.check_length([row])
    settings = settings or Tracing()
    assert row.subject_first is not None and row.subject_last is not None
    place = (row.subject_first, row.subject_last + 1)
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.samples, place[1] - place[0], embedding_matrix(lm.model).shape[1])
    answer = read_answer(lm, row)
    runs = Prompt(lm, row, torch.randn(size, generator=generator) * std * settings.noise, answer)
    window = settings.window_of(lm.layers)
    return Trace(
        prompt=fill(prompt, subject),
        tokens=tuple(lm.tokenizer.decode([token]) for token in row.ids),
        subject=place,
        answer=lm.tokenizer.decode(answer),
        clean=runs.probability,
        corrupted=runs.corrupted_probability,
        restored=measure_restorations(
            runs, lm.layers, settings.kinds, window, _columns(settings, place, len(row.ids))
        ),
        window=window,
    )


def _columns(settings: Tracing, subject: tuple[int, int], width: int) -> list[int]:
    """The tokens of a prompt of `width` at which states are restored."""
    if settings.tokens == "all":
        return list(range(width))
    if settings.tokens == "subject_last":
        return [subject[1] - 1]
    return sorted({places[len(places) // 2] for places in _class_places(subject, width) if places})


@typed
def trace_facts(
    lm: LM, facts: Sequence[Fact], settings: Tracing | None = None, *, std: float | None = None
) -> Iterator[Trace]:
    """Traces of the facts that the model knows, in their order, one after the other; the others are skipped.

    A fact is known if every token of its answer is the most likely one. `std` None: that of these facts' subjects.
    """
    std = embedding_std(lm, facts) if std is None else std
    known = known_facts(lm, facts)
    _log.info("%d of %d facts are known and traced", len(known), len(facts))
    for fact in known:
        yield trace_prompt(lm, fact.prompt, fact.subject, std, settings)


def read_answer(lm: LM, row: EncodedText) -> list[int]:
    """The tokens with which the model's answer to a prompt begins: one, or as many as say a number or a character."""

    def most_likely(count: int) -> list[int]:
        return decode(lm, [row], count, lambda logits: logits.argmax(-1))[0].tolist()

    if _is_complete(lm.tokenizer.decode(tokens := most_likely(1))):
        return tokens
    limit = MOST_ANSWER_TOKENS if lm.max_tokens is None else min(MOST_ANSWER_TOKENS, lm.max_tokens + 1 - len(row.ids))
    tokens = most_likely(limit)
    shown = [lm.tokenizer.decode(tokens[:end]) for end in range(1, len(tokens) + 1)]
    for end, (text, longer) in enumerate(pairwise(shown), 1):
        if _is_complete(text) or (text.strip().isdigit() and not longer[len(text) :].isdigit()):
            return tokens[:end]
    return tokens


def _is_complete(text: str) -> bool:
    """Whether a text says something, whatever follows: no blank, no part of a character, no number that may go on."""
    return bool(text.strip()) and not text.endswith(PARTIAL_CHARACTER) and not text.strip().isdigit()


def measure_restorations(
    prompt: Prompt, layers: int, kinds: Sequence[RestorationKind], window: int, columns: Sequence[int]
) -> dict[RestorationKind, Tensor]:
    """Per kind the answer's mean probability for every restored (token, layer), NaN elsewhere. (tokens, layers)"""
    runs = [run for kind in kinds for run in list_restorations(kind, layers, window)]
    tables: dict[RestorationKind, Tensor] = {kind: torch.full((prompt.width, layers), math.nan) for kind in kinds}
    with progress.stage("restoring", len(columns), unit="tokens", parts=1) as advance:
        for column, probabilities in prompt.restored(columns, runs):
            for run, probability in zip(runs, probabilities, strict=True):
                tables[run.kind][column, run.layer] = probability
            advance()
    return tables


# --- averages -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AverageEffects:
    """Average indirect effects over facts, with 95 % confidence intervals (1.96 standard errors)."""

    facts: int
    total: float
    """Mean total effect."""
    effects: dict[RestorationKind, Tensor]
    """(token classes, layers); NaN for a class that no fact has."""
    errors: dict[RestorationKind, Tensor]
    """Half the width of the interval. (token classes, layers)"""
    window: int

    def peak(self, kind: RestorationKind, token_class: str = "Last subject token") -> int:
        """The layer with the largest average effect."""
        return int(self.effects[kind][TOKEN_CLASSES.index(token_class)].argmax())


@typed
def average(traces: Sequence[Trace]) -> AverageEffects:
    """Averages by token class. Tokens of one class are averaged within a fact first, so that every fact counts once.

    Raises:
        InputError: no traces, or traces of different models or settings.
    """
    shapes = {(trace.window, *((kind, table.shape[1]) for kind, table in trace.restored.items())) for trace in traces}
    if len(shapes) != 1:
        raise InputError(
            f"expected traces of one model with one setting; got {len(traces)} traces of {len(shapes)}: "
            "trace facts that the model knows, and keep runs apart"
        )
    effects, errors = {}, {}
    for kind in traces[0].restored:
        per_fact = exact(torch.stack([_average_classes(trace, trace.effects(kind)) for trace in traces]))
        count = (~per_fact.isnan()).sum(0)  # (token classes, layers)
        mean = per_fact.nanmean(0)
        variance = (per_fact - mean).square().nansum(0) / (count - 1).clamp(min=1)
        effects[kind] = mean.float()
        errors[kind] = (1.96 * (variance / count).sqrt()).masked_fill(count < 2, math.nan).float()
    total = sum(trace.clean - trace.corrupted for trace in traces) / len(traces)
    return AverageEffects(len(traces), total, effects, errors, traces[0].window)


def _average_classes(trace: Trace, table: Tensor) -> Tensor:
    """A table (tokens, layers) as means over each token class, NaN for an empty one. (token classes, layers)"""
    places = _class_places(trace.subject, len(table))
    return torch.stack([table[list(place)].nanmean(0) for place in places])


def _class_places(subject: tuple[int, int], width: int) -> tuple[range, ...]:
    """The tokens of each of `TOKEN_CLASSES` in a prompt of `width`, whose subject has these bounds."""
    first, behind = subject
    last, end = behind - 1, width - 1
    return (
        range(first, first + 1),
        range(first + 1, last),
        range(last, last + 1),
        range(behind, min(behind, end) + 1),
        range(behind + 1, end),
        range(end, end + 1),
    )
