"""What an edit changed and what it did not: answers, other facts, and plain text.

facts = control_facts(lm, edits)
before = observe(lm, edits, facts)
with lm.patched(patch):
    after = observe(lm, edits, facts)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reknow.checks.arguments import typed
from reknow.datasets.facts import Fact, load_facts
from reknow.datasets.text import sample_text
from reknow.edits import Edit
from reknow.errors import EditFailed
from reknow.lm import LM
from reknow.model.exclusive import typed_exclusively
from reknow.tracing.known import known_facts

_RISE = 1.5
"""Perplexity that rises by more than this factor has collapsed; edits that work leave it within a few percent."""
_ANSWER_TOKENS = 6
"""Length of the completions that are shown."""
_SETS = ("counterfact", "known_1000")
"""Sets of facts that are asked, the next where too few of one are known: small models know few of CounterFact."""
_CANDIDATES = 200
"""How many facts of a set are asked to find some that the model knows."""
_ASKED_TOGETHER = 25
"""After so many the known ones are counted: the first few of them are enough."""
_LONGEST = 80
"""Characters of such a fact: short prompts are quick to read, and fit any model."""
_TEXTS, _TEXT_TOKENS = 8, 128
"""How much plain text the perplexity is taken over."""


@dataclass(frozen=True)
class AnswerStats:
    """How a model answers the prompt of an edit."""

    completion: str
    """Greedy continuation."""
    probability: float
    """Probability of the whole new answer behind the prompt."""
    rank: int
    """The worst place that a token of it has among all tokens, given those before it."""
    probability_true: float | None
    """Probability of the old answer, where the edit names one."""
    said: bool
    """Whether the model says it: every token of it is the most likely one, given those before it."""
    likeliest: tuple[tuple[str, float], ...] = ()
    """The tokens that most likely come next, as text, with their probabilities; the likeliest first."""


@dataclass(frozen=True)
class Snapshot:
    """A model at one moment."""

    answers: tuple[AnswerStats, ...]
    """How it answers each edit's prompt."""
    controls: tuple[str, ...]
    """Greedy continuation of each control fact."""
    perplexity: float
    """Perplexity of a few paragraphs of plain text."""
    also: tuple[str, ...] = ()
    """Greedy continuation of each further prompt."""


@typed_exclusively
def observe(lm: LM, edits: Sequence[Edit], facts: Sequence[Fact] = (), also: Sequence[str] = ()) -> Snapshot:
    """How the model, as it is now, answers the edits' prompts, the facts and further prompts, and how it reads plain
    text.

    Raises:
        ModelError, EditFailed: its logits are no numbers, without a patch or with those applied.
    """
    prompts = [*(edit.text for edit in edits), *(fact.text for fact in facts), *also]
    texts = [" ".join(text.split()) for text in lm.generate(prompts, _ANSWER_TOKENS)]
    next_tokens = lm.likeliest([edit.text for edit in edits])
    answers = tuple(
        _answer_stats(lm, edit, text, tokens)
        for edit, text, tokens in zip(edits, texts[: len(edits)], next_tokens, strict=True)
    )
    plain = sorted(sample_text(), key=len)[-_TEXTS:]
    further = len(edits) + len(facts)
    controls, others = tuple(texts[len(edits) : further]), tuple(texts[further:])
    found = Snapshot(answers, controls, lm.perplexity(plain, _TEXT_TOKENS), others)
    if any(map(math.isnan, (found.perplexity, *(answer.probability for answer in answers)))):
        raise EditFailed(
            f"expected numbers from {lm.name} with the patch; got NaN: open it with a wider dtype, bfloat16 or "
            "float32 (--dtype), or take another layer or method"
        )
    return found


def _answer_stats(lm: LM, edit: Edit, completion: str, likeliest: Sequence[tuple[str, float]]) -> AnswerStats:
    targets = [target for target in (edit.target_new, edit.target_true) if target is not None]
    scores = lm.score([edit.text] * len(targets), targets, [edit.separator] * len(targets))
    new, *old = [score.probability for score in scores]
    return AnswerStats(completion, new, scores[0].rank, old[0] if old else None, scores[0].said, tuple(likeliest))


def collapsed(before: Snapshot, after: Snapshot) -> list[str]:
    """What of the model an edit broke besides its fact, a clause for each; nothing where it is sound.

    Plain text whose perplexity rises by more than `_RISE` or is no number, and other facts most of which are
    continued in other words.
    """
    harms = []
    if not after.perplexity <= _RISE * before.perplexity:
        harms.append(f"perplexity of plain text goes from {before.perplexity:.2f} to {after.perplexity:.2f}")
    changed = sum(old != new for old, new in zip(before.controls, after.controls, strict=True))
    if 2 * changed > len(before.controls):
        harms.append(f"{changed} of {len(before.controls)} other facts are continued in other words than before")
    return harms


@typed
def control_facts(lm: LM, edits: Sequence[Edit], count: int = 6) -> list[Fact]:
    """Facts about other subjects that the model knows, those in the words of an edit first.

    A model that knows none of them gets some all the same: their answers should not change either.
    """
    prompts, subjects = {edit.prompt for edit in edits}, {edit.subject for edit in edits}
    asked: list[Fact] = []
    known: list[Fact] = []
    for name in _SETS:
        facts = [f for f in load_facts(name) if f.subject not in subjects and len(f.text) <= _LONGEST]
        facts = sorted(facts, key=lambda fact: fact.prompt not in prompts)[:_CANDIDATES]
        for start in range(0, len(facts), _ASKED_TOGETHER):
            known += known_facts(lm, facts[start : start + _ASKED_TOGETHER])
            if len(known) >= count:
                return known[:count]
        asked += facts
    return (known or asked)[:count]
