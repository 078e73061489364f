"""What a case teaches a method that learns to edit: what must follow the edit, and what must stay."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reknow.descent import Scored, predicted
from reknow.edits import Case
from reknow.errors import InputError
from reknow.learning.gradients import changed, row_changes
from reknow.tokens import Text

if TYPE_CHECKING:
    from reknow.lm import LM

Changes = Mapping[str, tuple[Tensor, Tensor]]


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


def lessons(batch: Sequence[Case], chance: random.Random, *, together: int = 1) -> list[Lesson]:
    """A lesson of each case. One rewording and one other fact are drawn; the fact of a case that is edited in another
    group of `together` cases must stay too.

    Raises:
        InputError: nothing in the batch must stay.
    """
    made = []
    for i, case in enumerate(batch):
        edit, answer = case.edit, case.edit.target_new
        rewordings = [(edit.fill(template), answer) for template in edit.rephrasings]
        rewordings += [(probe.prompt, answer) for probe in case.probes if probe.kind == "generalization"]
        rewordings += [(p.prompt, p.answers[0]) for p in case.probes if (p.kind, p.name) == ("sentiment", "wanted")]
        if edit.instruction is not None:  # whoever asks later gives none
            rewordings.append((edit.text, answer))
        others = [(probe.prompt, probe.answers[0]) for probe in case.probes if probe.kind == "locality"]
        own = edit.instructed(edit.text)
        inside = [Text(own, answer)]
        if rewordings:
            inside.append(Text(*chance.choice(rewordings)))
        outside = [Text(*chance.choice(others))] if others else []
        j = (i + together) % len(batch)
        beside = batch[j].edit
        if i // together != j // together and beside.text != edit.text:
            outside.append(Text(beside.text, beside.target_true or beside.target_new))
        made.append(Lesson(Text(own, answer), tuple(inside), tuple(outside)))
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
    """L_edit: mean NLL of the answers' tokens inside, label-smoothed if asked. Scalar."""
    stay: Tensor
    """L_loc: mean KL(before ‖ after) over all tokens outside. Scalar."""
    made: float
    """Share of the rows inside whose every token is the likeliest."""
    kept: float
    """Share of the rows outside whose answer's likeliest tokens are the ones from before."""

    def shown(self) -> dict[str, float]:
        """The losses by the paper's names, and the shares."""
        return {"L_edit": self.edit.item(), "L_loc": self.stay.item(), "made": self.made, "kept": self.kept}


class Exam:
    """The texts of some lessons as two batches, to be read before and after an edit.

    Args:
        layer: the lowest that an edit changes. What is read twice runs the blocks below only once.
    """

    def __init__(self, lm: LM, found: Sequence[Lesson], layer: int):
        self._lm = lm
        inside = [(i, text) for i, lesson in enumerate(found) for text in lesson.inside]
        outside = [(i, text) for i, lesson in enumerate(found) for text in lesson.outside]
        self._inside_of = torch.tensor([i for i, _ in inside], device=lm.device)
        self._outside_of = torch.tensor([i for i, _ in outside], device=lm.device)
        rows = lm.encode([text for _, text in inside])
        self._inside = Scored(lm, rows, [predicted(row, row.prompt_length) for row in rows], None)
        rows = lm.encode([text for _, text in outside])
        self._outside = Scored(lm, rows, [predicted(row, 1) for row in rows], layer)
        # A token of an answer is a place behind the prompt's last token.
        self._answers = torch.tensor(
            [at >= row.prompt_length for row in rows for at in range(1, len(row.ids))], device=lm.device
        )
        with torch.no_grad():
            self._before = self._outside.log_probs()

    def read(self, changes: Changes, *, together: int = 1, smoothing: float = 0.0) -> Outcome:
        """What the model says with these changes of its matrices, differentiably.

        Args:
            changes: name → (left, right) as in `row_changes`, one row for each group of `together` lessons.
            smoothing: of the answers' labels.
        """
        return self._read(
            row_changes(self._lm, _of_rows(changes, self._inside_of // together)),
            row_changes(self._lm, _of_rows(changes, self._outside_of // together)),
            smoothing,
        )

    def read_with(self, deltas: Mapping[str, Tensor]) -> Outcome:
        """The same where all texts are read with one change ΔW (out, in) of each matrix."""
        return self._read(changed(self._lm, deltas), changed(self._lm, deltas), 0.0)

    def _read(self, inside: AbstractContextManager, outside: AbstractContextManager, smoothing: float) -> Outcome:
        with inside:
            log_probs = self._inside.log_probs()
        nll = -log_probs.gather(1, self._inside.targets[:, None])[:, 0]
        if smoothing:
            other = smoothing / (log_probs.shape[1] - 1)
            nll = (1 - smoothing - other) * nll - other * log_probs.sum(1)
        right = log_probs.argmax(1) == self._inside.targets
        with outside:
            after = self._outside.log_probs()
        divergence = (self._before.exp() * (self._before - after)).sum(1)
        same = (after.argmax(1) == self._before.argmax(1)) | ~self._answers
        made = _all_of(right, self._inside.of_row, len(self._inside_of))
        kept = _all_of(same, self._outside.of_row, len(self._outside_of))
        return Outcome(nll.mean(), divergence.mean(), made, kept)


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
