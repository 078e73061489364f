"""What a case teaches a method that learns to edit: what must follow the edit, and what must stay."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reknow.descent import Scored, predicted
from reknow.edits import Case
from reknow.tokens import Text

if TYPE_CHECKING:
    from reknow.lm import LM


@dataclass(frozen=True)
class Lesson:
    """Texts made of one case; each has an answer."""

    edit: Text
    inside: tuple[Text, ...]
    """Must be answered as the edit asks: its own prompt, and a rewording where the case has one."""
    outside: tuple[Text, ...]
    """Must be continued as before: other facts."""


def lessons(batch: Sequence[Case], chance: random.Random) -> list[Lesson]:
    """A lesson of each case. One rewording and one other fact are drawn; the fact of the next case in the batch is
    another one that must stay."""
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
        beside = batch[(i + 1) % len(batch)].edit
        if beside.text != edit.text:
            outside.append(Text(beside.text, beside.target_true or beside.target_new))
        made.append(Lesson(Text(own, answer), tuple(inside), tuple(outside)))
    return made


class Exam:
    """The texts of some lessons as two batches, to be read before and after an edit.

    Args:
        layer: the lowest that an edit changes. What is read twice runs the blocks below only once.

    Attributes:
        inside_of, outside_of: (rows,) lesson of each row of the two batches.
    """

    def __init__(self, lm: LM, found: Sequence[Lesson], layer: int):
        inside = [(i, text) for i, lesson in enumerate(found) for text in lesson.inside]
        outside = [(i, text) for i, lesson in enumerate(found) for text in lesson.outside]
        self.inside_of = torch.tensor([i for i, _ in inside], device=lm.device)
        self.outside_of = torch.tensor([i for i, _ in outside], device=lm.device)
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

    def edit_loss(self, smoothing: float = 0.0) -> tuple[Tensor, float]:
        """(mean NLL of the answers' tokens inside, share of the rows whose every token is the likeliest)."""
        log_probs = self._inside.log_probs()
        nll = -log_probs.gather(1, self._inside.targets[:, None])[:, 0]
        if smoothing:
            other = smoothing / (log_probs.shape[1] - 1)
            nll = (1 - smoothing - other) * nll - other * log_probs.sum(1)
        right = log_probs.argmax(1) == self._inside.targets
        return nll.mean(), _all_of(right, self._inside.of_row, len(self.inside_of))

    def locality_loss(self) -> tuple[Tensor, float]:
        """(mean KL(before ‖ after) over all tokens outside, share of the rows whose answer stays the likeliest)."""
        after = self._outside.log_probs()
        divergence = (self._before.exp() * (self._before - after)).sum(1)
        same = (after.argmax(1) == self._before.argmax(1)) | ~self._answers
        return divergence.mean(), _all_of(same, self._outside.of_row, len(self.outside_of))


def _all_of(flags: Tensor, of_row: Tensor, rows: int) -> float:
    """Share of the rows in which every flag is set."""
    missed = torch.zeros(rows, device=flags.device).index_add_(0, of_row, (~flags).float())
    return float((missed == 0).float().mean())
