"""What a case teaches a method that learns to edit: what must follow the edit, and what must stay."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from reknow.edits import Case
from reknow.errors import InputError
from reknow.learning.gradients import changed, row_changes
from reknow.model.scored_tokens import ScoredTokens, predictions
from reknow.model.scoring import kl_divergence
from reknow.model.tokens import Text, split_by_length

if TYPE_CHECKING:
    from reknow.lm import LM

Changes = Mapping[str, tuple[Tensor, Tensor]]
StayAt = Literal["all", "answer"]
MeanOver = Literal["tokens", "texts"]


@dataclass(frozen=True)
class Lesson:
    """Texts made of one case; each has an answer."""

    edit: Text
    inside: tuple[Text, ...]
    """Must be answered as the edit asks: its own prompt, and a rewording where the case has one."""
    outside: tuple[Text, ...]
    """Must be continued as before: other facts."""


def bare(cases: Sequence[Case]) -> list[Case]:
    """The cases without instructions, for methods that do not read any."""
    return [replace(case, edit=replace(case.edit, instruction=None)) for case in cases]


def lessons(batch: Sequence[Case], rng: random.Random, *, together: int = 1, locality_facts: int = 1) -> list[Lesson]:
    """A lesson of each case. One rewording and `locality_facts` are drawn; the fact of a case that is edited in
    another group of `together` cases must stay too.

    Raises:
        InputError: nothing in the batch must stay.
    """
    made = []
    for i, case in enumerate(batch):
        edit = case.edit
        rewordings = [Text.asked(edit, edit.fill(template)) for template in edit.rephrasings]
        rewordings += [
            Text.of_probe(probe, edit.target_new) for probe in case.probes if probe.kind == "generalization"
        ]
        rewordings += [Text.of_probe(p) for p in case.probes if (p.kind, p.name) == ("sentiment", "wanted")]
        if edit.instruction is not None:  # whoever asks later gives none
            rewordings.append(Text.asked(edit))
        others = [Text.of_probe(probe) for probe in case.probes if probe.kind == "locality"]
        own = Text.asked(edit, edit.instructed(edit.text))
        inside = [own]
        if rewordings:
            inside.append(rng.choice(rewordings))
        outside = rng.sample(others, min(len(others), locality_facts))
        j = (i + together) % len(batch)
        beside = batch[j].edit
        if i // together != j // together and beside.text != edit.text:
            outside.append(Text(beside.text, beside.target_true or beside.target_new, separator=beside.separator))
        made.append(Lesson(own, tuple(inside), tuple(outside)))
    if not any(lesson.outside for lesson in made):
        about = batch[0].edit.id or repr(batch[0].edit.text)
        raise InputError(
            f"expected cases with locality probes, to learn what must stay; {about} and those beside it have none: "
            "choose a data set that has them"
        )
    return made


@dataclass(frozen=True)
class Outcome:
    """How an exam went."""

    edit: Tensor
    """L_edit: mean NLL of the answers inside, label-smoothed if asked. Scalar."""
    stay: Tensor
    """L_loc: mean KL(before ‖ after) outside. Scalar."""
    made: float
    """Share of the rows inside whose every token is the likeliest."""
    kept: float
    """Share of the rows outside whose answer's likeliest tokens are the ones from before."""

    def shown(self) -> dict[str, float]:
        """The losses by the paper's names, and the shares."""
        return {"L_edit": self.edit.item(), "L_loc": self.stay.item(), "made": self.made, "kept": self.kept}


class Asked:
    """Texts of lessons, in batches of rows of like length.

    Args:
        texts: (number of the lesson, text).
        layer: as in `ScoredTokens`.
        answers_only: score the answers' tokens, not the prompts'.
    """

    def __init__(self, lm: LM, texts: Sequence[tuple[int, Text]], layer: int | None, *, answers_only: bool):
        rows = lm.encode([text for _, text in texts])
        self.rows, self._parts = len(rows), []
        answers = []
        for part in split_by_length([len(row.ids) for row in rows]):
            here = [rows[i] for i in part]
            pairs = [predictions(row, row.prompt_length if answers_only else 1) for row in here]
            lessons_of = torch.tensor([texts[i][0] for i in part], device=lm.device)
            self._parts.append((lessons_of, ScoredTokens(lm, here, pairs, layer)))
            answers += [at + 1 >= row.prompt_length for row, of in zip(here, pairs, strict=True) for at, _ in of]
        starts = accumulate((len(lessons_of) for lessons_of, _ in self._parts), initial=0)
        scored = [scored for _, scored in self._parts]
        self.of_row = torch.cat([start + one.of_row for start, one in zip(starts, scored, strict=False)])
        self.targets = torch.cat([one.targets for one in scored])
        self.in_answer = torch.tensor(answers, device=lm.device)

    def log_probs(self, changed: Callable[[Tensor], AbstractContextManager] | None = None) -> Tensor:
        """Log-probabilities of all tokens at the scored places. (n, vocabulary)

        Args:
            changed: opens the change with which the rows of these lessons are read; None: none.
        """
        found = []
        for lessons_of, scored in self._parts:
            with nullcontext() if changed is None else changed(lessons_of):
                found.append(scored.log_probs())
        return torch.cat(found)

    def mean(self, values: Tensor, over: MeanOver) -> Tensor:
        """The mean of a value for each scored place, over all of them or over the texts' means. Scalar."""
        if over == "tokens":
            return values.mean()
        counts = torch.bincount(self.of_row, minlength=self.rows)
        return (values / counts[self.of_row]).sum() / self.rows


class Exam:
    """The texts of some lessons, to be read before and after an edit.

    Args:
        layer: the lowest that an edit changes. What is read twice runs the blocks below only once.
        locality_tokens: whether all tokens of the texts outside must stay, or those of their answers.
        average_over: what counts alike in the losses, tokens or texts.
    """

    def __init__(
        self, lm: LM, found: Sequence[Lesson], layer: int, *, locality_tokens: StayAt, average_over: MeanOver
    ):
        self._lm = lm
        self._over: MeanOver = average_over
        inside = [(i, text) for i, lesson in enumerate(found) for text in lesson.inside]
        outside = [(i, text) for i, lesson in enumerate(found) for text in lesson.outside]
        self._inside = Asked(lm, inside, None, answers_only=True)
        self._outside = Asked(lm, outside, layer, answers_only=locality_tokens == "answer")
        with torch.no_grad():
            self._before = self._outside.log_probs()

    def read(self, changes: Changes, *, together: int = 1, smoothing: float = 0.0) -> Outcome:
        """What the model says with these changes of its matrices, differentiably.

        Args:
            changes: name → (left, right) as in `row_changes`, one row for each group of `together` lessons.
            smoothing: of the answers' labels.
        """
        return self._read(lambda of: row_changes(self._lm, _of_rows(changes, of // together)), smoothing)

    def read_with(self, deltas: Mapping[str, Tensor]) -> Outcome:
        """The same where all texts are read with one change ΔW (out, in) of each matrix."""
        return self._read(lambda _: changed(self._lm, deltas), 0.0)

    def _read(self, change: Callable[[Tensor], AbstractContextManager], smoothing: float) -> Outcome:
        log_probs = self._inside.log_probs(change)
        nll = -log_probs.gather(1, self._inside.targets[:, None])[:, 0]
        if smoothing:
            other = smoothing / (log_probs.shape[1] - 1)
            nll = (1 - smoothing - other) * nll - other * log_probs.sum(1)
        right = log_probs.argmax(1) == self._inside.targets
        after = self._outside.log_probs(change)
        divergence = kl_divergence(self._before, after)
        same = (after.argmax(1) == self._before.argmax(1)) | ~self._outside.in_answer
        made = _all_of(right, self._inside.of_row, self._inside.rows)
        kept = _all_of(same, self._outside.of_row, self._outside.rows)
        edit, stay = self._inside.mean(nll, self._over), self._outside.mean(divergence, self._over)
        return Outcome(edit, stay, made, kept)


def _of_rows(changes: Changes, group: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (left[group], right[group]) for name, (left, right) in changes.items()}


def averaged(
    trial: Callable[[Sequence[Case], random.Random], Mapping[str, float]], cases: Sequence[Case], size: int
) -> dict[str, float]:
    """The mean of what a trial gives, over all cases in batches of `size`, which are always the same."""
    sums: dict[str, float] = {}
    for start in range(0, len(cases), size):
        part = cases[start : start + size]
        for name, value in trial(part, random.Random(start)).items():
            sums[name] = sums.get(name, 0.0) + value * len(part) / len(cases)
    return sums


def _all_of(flags: Tensor, of_row: Tensor, rows: int) -> float:
    """Share of the rows in which every flag is set."""
    missed = torch.zeros(rows, device=flags.device).index_add_(0, of_row, (~flags).float())
    return float((missed == 0).float().mean())
