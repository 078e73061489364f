"""Training a scope classifier: what can be asked about an edit inside and outside its scope, and the losses.

Paraphrases and other facts come from the cases themselves. What they lack is made from one another, since a data set
rarely has enough of it: paraphrases borrowed from cases that ask the same of another subject, sentences put in front,
near neighbours that ask about other subjects, and other questions about the same subject.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reknow.edits import Case, Edit
from reknow.errors import InputError
from reknow.memories.embedding import embed_texts
from reknow.memories.nearest import Nearest
from reknow.memories.scope import StateCache, log_in_scope, scope_loss
from reknow.memories.scope_and_counterfactual import ScopeAndCounterfactual
from reknow.texts.templates import split_template

if TYPE_CHECKING:
    from reknow.lm import LM

__all__ = ["ScopeCases", "ScopeLearner"]

_PREFIXED = 0.25
"""Share of the questions that stand behind an unrelated statement."""
_SETS, _LEAST_SETS = 16384, 4
"""Sets of questions about all cases, and about one at least; one is asked at a time. So few that their states can be
kept and each is read only once."""
_TRIES = 10
"""Draws of another case before one is given up."""


class ScopeCases:
    """Questions about each case's edit, drawn at random.

    Args:
        neighbors, skipped: hard negatives are the edits and locality probes of other cases nearest to an edit, so
            many of them, without the very nearest, which may ask the same.

    Raises:
        InputError: no case has a paraphrase.
    """

    def __init__(self, lm: LM, cases: Sequence[Case], *, neighbors: int = 50, skipped: int = 5):
        self.cases = list(cases)
        self.index = {case.edit.text: i for i, case in enumerate(self.cases)}
        self._paraphrases = [_paraphrases(case) for case in self.cases]
        if not any(self._paraphrases):
            raise InputError(
                f"expected cases with rephrasings to learn scopes from; got {len(self.cases)} without any: give "
                "cases with generalization probes, or edits with rephrasings"
            )
        self._unrelated = [_prompts(case, "locality") for case in self.cases]
        self._templates = [_templates(case, own) for case, own in zip(self.cases, self._paraphrases, strict=True)]
        self._texts = [
            "\n".join([case.edit.text, *(probe.prompt for probe in case.probes)]).lower() for case in self.cases
        ]
        self._same_prompt: dict[str, list[int]] = defaultdict(list)
        for i, case in enumerate(self.cases):
            self._same_prompt[case.edit.prompt].append(i)
        self._near = self._neighbors(lm, neighbors, skipped)

    def in_scope(self, i: int, rng: random.Random) -> str:
        """A question that falls in the scope of edit i: its own prompt or a paraphrase."""
        edit = self.cases[i].edit
        questions = [edit.text, *self._paraphrases[i]]
        if edit.subject is not None:
            borrowed = self._templates[rng.choice(self._same_prompt[edit.prompt])]
            questions += [edit.fill(template) for template in borrowed if template != edit.prompt]
        return self._prefixed(rng.choice(questions), rng)

    def out_of_scope(self, i: int, rng: random.Random) -> list[str]:
        """Four questions that do not: two of its own, a near neighbour of other cases, and another case's question
        about the same subject."""
        own = rng.sample(self._unrelated[i], min(2, len(self._unrelated[i])))
        near = [rng.choice(self._near[i]) for _ in range(3 - len(own))]
        same_subject = self.same_subject(i, rng) or rng.choice(self._near[i])
        return [*own, *(self._prefixed(text, rng) for text in (*near, same_subject))]

    def same_subject(self, i: int, rng: random.Random) -> str | None:
        """Another case's question about this one's subject; None where none was found."""
        edit = self.cases[i].edit
        for _ in range(_TRIES):
            other = rng.randrange(len(self.cases))
            if edit.subject is not None and self._templates[other] and not self._related(i, other):
                return edit.fill(rng.choice(self._templates[other]))
        return None

    def _prefixed(self, question: str, rng: random.Random) -> str:
        """The question, or, for a share of them, behind an unrelated statement."""
        if rng.random() >= _PREFIXED:
            return question
        other = rng.randrange(len(self.cases))
        return f"{rng.choice(self._unrelated[other] or [self.cases[other].edit.text])}. {question}"

    def _related(self, i: int, other: int) -> bool:
        """Whether the words of one's question occur in the other: they may ask the same."""
        own, others = (_words(self.cases[k].edit) for k in (i, other))
        return others in self._texts[i] or own in self._texts[other]

    def _neighbors(self, lm: LM, count: int, skipped: int) -> list[list[str]]:
        edits = [case.edit.text for case in self.cases]
        pool = list(dict.fromkeys(edits + [text for texts in self._unrelated for text in texts[:1]]))
        vectors = embed_texts(lm, pool)
        indices = Nearest(vectors).search(vectors[: len(edits)], count + skipped)[1].tolist()
        neighbors = []
        for case, near in zip(self.cases, indices, strict=True):
            name = case.edit.subject or case.edit.text
            neighbors.append([pool[k] for k in near[skipped:] if name not in pool[k]] or [pool[near[-1]]])
        return neighbors


def _prompts(case: Case, kind: str) -> list[str]:
    return list(dict.fromkeys(probe.prompt for probe in case.probes if probe.kind == kind))


def _paraphrases(case: Case) -> list[str]:
    edit = case.edit
    own = [edit.fill(template) for template in edit.rephrasings]
    return [text for text in dict.fromkeys([*own, *_prompts(case, "generalization")]) if text != edit.text]


def _templates(case: Case, paraphrases: Sequence[str]) -> list[str]:
    """The case's prompt and paraphrases with `{}` for the subject, where its name stands there once."""
    subject = case.edit.subject
    if subject is None:
        return []
    templates = [text.replace(subject, "{}") for text in paraphrases if text.count(subject) == 1]
    return [case.edit.prompt, *(template for template in templates if template.count("{}") == 1)]


def _words(edit: Edit) -> str:
    """The longest part of the prompt beside the subject."""
    return max(split_template(edit.prompt), key=len).strip().lower()


class ScopeLearner:
    """Draws questions, and trains classifier and counterfactual model on them, each with its own loss.

    Args:
        max_questions: of a batch, that the counterfactual model learns to answer.
        threshold: p above which a question counts as in scope, in the validation.
    """

    def __init__(
        self,
        module: ScopeAndCounterfactual,
        lm: LM,
        train_cases: Sequence[Case],
        validation_cases: Sequence[Case],
        *,
        learning_rate: float,
        max_questions: int,
        threshold: float,
    ):
        self.module = module
        self._states = StateCache(module.states)
        self._train = ScopeCases(lm, train_cases)
        self._validation = ScopeCases(lm, validation_cases) if validation_cases else None
        self._learning_rate, self._max_questions, self._threshold = learning_rate, max_questions, threshold

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.module.parameters(), lr=self._learning_rate)

    def loss(self, batch: Sequence[Case], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        indices = [self._train.index[case.edit.text] for case in batch]
        inside, outside, answer = self._read(self._train, indices, rng, self._max_questions)
        scope = torch.stack([scope_loss(a, b) for a, b in zip(inside, outside, strict=True)]).sum()
        return scope + answer, {"scope": scope.item(), "answer": answer.item()}

    @torch.no_grad()
    def validate(self, cases: Sequence[Case]) -> dict[str, float]:
        assert self._validation is not None
        inside, outside, answer = self._read(self._validation, range(len(cases)), random.Random(0), len(cases))
        limit = math.log(self._threshold)
        scope = sum(float(scope_loss(a, b)) for a, b in zip(inside, outside, strict=True))
        return {
            "loss": scope + float(answer),
            "in_scope": float((inside[-1] > limit).float().mean()),
            "out_of_scope": float((outside[-1] <= limit).float().mean()),
            "answer": float(answer),
        }

    def _read(
        self, cases: ScopeCases, indices: Sequence[int], rng: random.Random, max_questions: int
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """log p of pairs inside and outside a scope, for each classifier, and the first answers' mean −log P."""
        edits = [cases.cases[i].edit for i in indices]
        sets = max(_LEAST_SETS, _SETS // len(cases.cases))
        rngs = [random.Random(f"{i}/{rng.randrange(sets)}") for i in indices]
        inside = [cases.in_scope(i, own_rng) for i, own_rng in zip(indices, rngs, strict=True)]
        outside = [text for i, own_rng in zip(indices, rngs, strict=True) for text in cases.out_of_scope(i, own_rng)]
        count, hard = len(edits), len(outside) // len(edits)
        tokens, mask = self._states([*(edit.text for edit in edits), *inside, *outside])
        vectors = self.module.scope((tokens, mask))
        log_p = log_in_scope(vectors[count:], vectors[:count], cosine=self.module.cosine)  # (questions, edits)
        own = torch.arange(count, device=log_p.device)
        # As many questions of other cases as hard ones, so that either half of the mean counts the same.
        easy = [log_p[own, (own + shift) % count] for shift in range(1, min(hard, count - 1) + 1)]
        apart = log_p[count:].view(count, hard, count)[own, :, own].flatten()
        log_inside, log_outside = [log_p[own, own]], [torch.cat([apart, *easy])]
        if self.module.cross is not None:
            which = torch.cat([own, own.repeat_interleave(hard), (own + 1) % count])
            asked = torch.cat([count + own, torch.arange(2 * count, len(tokens), device=own.device), count + own])
            judged = self.module.cross((tokens[which], mask[which]), (tokens[asked], mask[asked]))
            log_inside.append(judged[:count])
            log_outside.append(judged[count:])
        answered = list(zip(edits, inside, strict=True))[:max_questions]
        return log_inside, log_outside, self.module.answer_loss(answered)
