"""How SERAC's scope classifiers and counterfactual model are trained. (Mitchell et al. 2022, arXiv 2206.06520, §3.2)

For n edits of a batch, each with one question inside its scope and k hard ones outside (`ScopeCases.sample`):

    loss = Σ over the classifiers of scope_loss(pairs in scope, pairs out of scope)     p of a pair: edit, question
           + mean −log P of the answers' tokens, by the counterfactual model, to the questions inside

Every question inside is paired with other edits of the batch too: these pairs are the easy ones out of scope.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reknow.edits import Case
from reknow.learning.training import Split
from reknow.lm import LM
from reknow.memories.serac.cases import QUESTIONS, SETS, Sample, ScopeCases
from reknow.memories.serac.models import ScopeAndCounterfactual
from reknow.memories.serac.scope import log_in_scope, scope_loss
from reknow.memories.serac.states import StateCache, States

__all__ = ["LearnerSettings", "ScopeLearner"]

_KEPT_BYTES = 2**31
"""What the states of questions may take, which are kept in half precision."""
_TOKENS = 16
"""What a question is taken to have."""


class LearnerSettings(NamedTuple):
    """The settings of SERAC that its training needs beside those of what is trained."""

    learning_rate: float
    """Learning rate of Adam."""
    max_questions: int
    """Questions of a batch, at most, that the counterfactual model learns to answer."""
    threshold: float
    """p above which a question counts as in scope, in the validation."""


class _Pairs(NamedTuple):
    """log p of pairs of an edit and a question, by one classifier."""

    inside: Tensor
    """Questions in scope. (n,)"""
    outside: Tensor
    """Questions out of scope. (pairs,)"""


class ScopeLearner:
    """Draws questions, and trains the classifiers and the counterfactual model on them."""

    def __init__(self, module: ScopeAndCounterfactual, lm: LM, cases: Split, settings: LearnerSettings):
        self.module = module
        self._settings = settings
        self._states = StateCache(module.states, _KEPT_BYTES)
        set_bytes = QUESTIONS * _TOKENS * 2 * module.states.features
        self._train = ScopeCases(lm, cases.train, sets=min(SETS, _KEPT_BYTES // set_bytes))
        self._validation = ScopeCases(lm, cases.validation) if cases.validation else None

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.module.parameters(), lr=self._settings.learning_rate)

    def loss(self, batch: Sequence[Case], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        sample = self._train.sample([self._train.index[case.edit.text] for case in batch], rng)
        scope = torch.stack([scope_loss(*pairs) for pairs in self._judge(sample)]).sum()
        answer = self._answer_loss(sample, self._settings.max_questions)
        return scope + answer, {"scope": scope.item(), "answer": answer.item()}

    @torch.no_grad()
    def validate(self, cases: Sequence[Case]) -> dict[str, float]:
        assert self._validation is not None
        sample = self._validation.sample(range(len(cases)), random.Random(0))
        judged, answer = self._judge(sample), float(self._answer_loss(sample, len(cases)))
        last, limit = judged[-1], math.log(self._settings.threshold)
        return {
            "loss": sum(float(scope_loss(*pairs)) for pairs in judged) + answer,
            "in_scope": float((last.inside > limit).float().mean()),
            "out_of_scope": float((last.outside <= limit).float().mean()),
            "answer": answer,
        }

    def _judge(self, sample: Sample) -> list[_Pairs]:
        """By the vectors; and by the cross classifier, where there is one."""
        hard = [question for questions in sample.outside for question in questions]
        states = self._states([*(edit.text for edit in sample.edits), *sample.inside, *hard])
        pairs = [self._embedding_pairs(states, len(sample.edits))]
        return pairs if self.module.cross is None else [*pairs, self._cross_pairs(states, len(sample.edits))]

    def _embedding_pairs(self, states: States, n: int) -> _Pairs:
        """By the vectors, which are compared all with all. states: of n edits, n questions inside, n k hard ones"""
        vectors = self.module.scope(states)  # (n + n + n k, size)
        log_p = log_in_scope(vectors[n:], vectors[:n], cosine=self.module.cosine)  # (n + n k, n)
        asked, hard = log_p[:n], log_p[n:].view(n, -1, n)  # (n, n) and (n, k, n), the last by edit
        own_hard = hard.diagonal(dim1=0, dim2=2).T  # (n, k)
        # As many easy questions as hard ones, so that either half of the mean counts the same.
        shifts = range(1, min(hard.shape[1], n - 1) + 1)
        easy = [asked.roll(-shift, dims=1).diagonal() for shift in shifts]  # question i with edit i + shift
        return _Pairs(asked.diagonal().contiguous(), torch.cat([own_hard.flatten(), *easy]))

    def _cross_pairs(self, states: States, n: int) -> _Pairs:
        """By the cross classifier, which reads each pair: an edit with its question inside, with its k hard ones, and
        with the question inside the scope of the edit before it. states: as above"""
        assert self.module.cross is not None
        first, second = [], []
        for each in states:  # the states of tokens, then which tokens are real
            edits, inside, hard = each[:n], each[n : 2 * n], each[2 * n :]
            first.append(torch.cat([edits, edits.repeat_interleave(len(hard) // n, dim=0), edits.roll(-1, dims=0)]))
            second.append(torch.cat([inside, hard, inside]))
        log_p = self.module.cross((first[0], first[1]), (second[0], second[1]))  # (n + n k + n,)
        return _Pairs(log_p[:n], log_p[n:])

    def _answer_loss(self, sample: Sample, max_questions: int) -> Tensor:
        """The counterfactual model's mean −log P of the edits' answers to the first questions inside."""
        return self.module.answer_loss(list(zip(sample.edits, sample.inside, strict=True))[:max_questions])
