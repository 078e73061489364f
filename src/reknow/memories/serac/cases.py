"""What SERAC is trained on: questions inside and outside the scope of an edit.

Paraphrases and other facts come from the cases themselves. What they lack is made from one another, since a data set
rarely has enough of it: paraphrases borrowed from cases that ask the same of another subject, sentences put in front,
near neighbours that ask about other subjects, and other questions about the same subject.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from reknow.edits import Case, Edit
from reknow.errors import InputError
from reknow.lm import LM
from reknow.memories.embedding import embed_texts
from reknow.memories.nearest import Nearest
from reknow.texts.templates import split_template

__all__ = ["QUESTIONS", "SETS", "Sample", "ScopeCases"]

_PREFIXED = 0.25
"""Share of the questions that stand behind an unrelated statement."""
SETS, _LEAST_SETS = 16384, 4
"""Sets of questions about all cases, and about one at least; one is asked at a time. So few that their states can be
kept and each is read only once."""
QUESTIONS = 5
"""How many questions a set has: one inside the scope, four outside."""
_TRIES = 10
"""Draws of another case before one is given up."""


class Sample(NamedTuple):
    """Edits, and questions drawn for each."""

    edits: list[Edit]
    inside: list[str]
    """A question in the scope of each edit."""
    outside: list[list[str]]
    """Questions close to each edit and out of its scope, as many for each."""


class ScopeCases:
    """Questions about each case's edit, drawn at random.

    Args:
        sets: how many sets of questions there are about all cases together.
        neighbors, skipped: hard negatives are the edits and locality probes of other cases nearest to an edit, so
            many of them, without the very nearest, which may ask the same.

    Raises:
        InputError: no case has a paraphrase.
    """

    def __init__(self, lm: LM, cases: Sequence[Case], *, sets: int = SETS, neighbors: int = 50, skipped: int = 5):
        self.cases = list(cases)
        self._sets = max(_LEAST_SETS, sets // len(self.cases))
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

    def sample(self, indices: Sequence[int], rng: random.Random) -> Sample:
        """One of the sets of questions about each of these edits."""
        inside, outside = [], []
        for i in indices:
            own_rng = random.Random(f"{i}/{rng.randrange(self._sets)}")
            inside.append(self.in_scope(i, own_rng))
            outside.append(self.out_of_scope(i, own_rng))
        return Sample([self.cases[i].edit for i in indices], inside, outside)

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
