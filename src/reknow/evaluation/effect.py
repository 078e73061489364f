"""What an edit changed and what it did not: answers, other facts, plain text, and the bits of the weights.

facts = control_facts(lm, edits)
before = observe(lm, edits, facts)
with lm.patched(patch):
    after = observe(lm, edits, facts)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reknow.checks.arguments import typed
from reknow.datasets.facts import Fact, load_facts
from reknow.datasets.text import sample_text
from reknow.edits import Case, Edit
from reknow.errors import EditFailed, TextRefused
from reknow.model.exclusive import typed_exclusively
from reknow.model.tokens import Text

if TYPE_CHECKING:
    from reknow.lm import LM

RISE = 1.5
"""Perplexity that rises by more than this factor has collapsed; edits that work leave it within a few percent."""
ANSWER_TOKENS = 6
"""Length of the completions that are shown."""
CANDIDATES = 200
"""How many facts are asked to find some that the model knows."""
LONGEST = 80
"""Characters of such a fact: short prompts are quick to read, and fit any model."""
TEXTS, TEXT_TOKENS = 8, 128
"""How much plain text the perplexity is taken over."""


@dataclass(frozen=True)
class Standing:
    """How a model answers the prompt of an edit."""

    completion: str
    """Greedy continuation."""
    probability: float
    """Of the whole new answer behind the prompt."""
    rank: int
    """The worst place that a token of it has among all tokens, given those before it."""
    probability_true: float | None
    """Of the old answer, where the edit names one."""
    said: bool
    """Whether the model says it: every token of it is the likeliest, given those before it."""


@dataclass(frozen=True)
class Observation:
    """A model at one moment."""

    standings: tuple[Standing, ...]
    """One per edit."""
    controls: tuple[str, ...]
    """Greedy continuation of each control fact."""
    perplexity: float
    """Of a few paragraphs of plain text."""


@typed_exclusively
def observe(lm: LM, edits: Sequence[Edit], facts: Sequence[Fact] = ()) -> Observation:
    """How the model, as it is now, answers the edits' prompts and the facts, and how it reads plain text.

    Raises:
        ModelError, EditFailed: its logits are no numbers, without a patch or with those applied.
    """
    prompts = [edit.text for edit in edits] + [fact.text for fact in facts]
    texts = [" ".join(text.split()) for text in lm.generate(prompts, ANSWER_TOKENS)]
    standings = tuple(_standing(lm, edit, text) for edit, text in zip(edits, texts, strict=False))
    plain = sorted(sample_text(), key=len)[-TEXTS:]
    found = Observation(standings, tuple(texts[len(edits) :]), lm.perplexity(plain, TEXT_TOKENS))
    if any(map(math.isnan, (found.perplexity, *(standing.probability for standing in standings)))):
        raise EditFailed(
            f"expected numbers from {lm.name} with the patch; got NaN: open it with a wider dtype, bfloat16 or "
            "float32 (--dtype), or take another layer or method"
        )
    return found


def _standing(lm: LM, edit: Edit, completion: str) -> Standing:
    answers = [answer for answer in (edit.target_new, edit.target_true) if answer is not None]
    scores = lm.score([edit.text] * len(answers), answers, [edit.separator] * len(answers))
    new, *old = [math.exp(-score.nll * len(score.hits)) for score in scores]
    return Standing(completion, new, scores[0].rank, old[0] if old else None, scores[0].said)


def collapsed(before: Observation, after: Observation) -> list[str]:
    """What of the model an edit broke besides its fact, a clause for each; nothing where it is sound.

    Plain text whose perplexity rises by more than `RISE` or is no number, and other facts most of which are
    continued in other words.
    """
    said = []
    if not after.perplexity <= RISE * before.perplexity:
        said.append(f"perplexity of plain text goes from {before.perplexity:.2f} to {after.perplexity:.2f}")
    changed = sum(old != new for old, new in zip(before.controls, after.controls, strict=True))
    if 2 * changed > len(before.controls):
        said.append(f"{changed} of {len(before.controls)} other facts are continued in other words than before")
    return said


@typed
def control_facts(lm: LM, edits: Sequence[Edit], count: int = 6) -> list[Fact]:
    """Facts about other subjects that the model knows, those in the wording of an edit first.

    A model that knows none of them gets some all the same: their answers should not change either.
    """
    wordings, subjects = {edit.prompt for edit in edits}, {edit.subject for edit in edits}
    facts = [f for f in load_facts("counterfact") if f.subject not in subjects and len(f.text) <= LONGEST]
    facts = sorted(facts, key=lambda fact: fact.prompt not in wordings)[:CANDIDATES]
    scores = lm.score([fact.text for fact in facts], [fact.answer for fact in facts])
    known = [fact for fact, score in zip(facts, scores, strict=True) if score.said]
    return (known or facts)[:count]


@typed
def known_cases(lm: LM, cases: Sequence[Case]) -> list[Case]:
    """The cases whose old answer the model gives: teacher-forced, every token. What it cannot read it knows not."""
    asked = [case for case in cases if case.edit.target_true is not None and _fits(lm, case.edit)]
    old = [str(case.edit.target_true) for case in asked]
    scores = lm.score([case.edit.text for case in asked], old, [case.edit.separator for case in asked])
    return [case for case, score in zip(asked, scores, strict=True) if score.said]


def _fits(lm: LM, edit: Edit) -> bool:
    try:
        lm.check_length(lm.encode([Text(edit.text, str(edit.target_true), separator=edit.separator)]))
    except TextRefused:
        return False
    return True


def weight_bits(model: torch.nn.Module) -> dict[str, str]:
    """A hash of the bits of every parameter and buffer in memory, by name; quantised ones as they are stored."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: hashlib.blake2b(b"".join(map(_bytes, _stored(tensor.detach()))), digest_size=16).hexdigest()
        for name, tensor in tensors.items()
        if tensor.device.type != "meta"
    }


def _stored(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors in which a tensor is kept: itself, or what one of torchao's consists of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in _stored(getattr(tensor, name))]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
