"""The edits' prompts asked again: of the base, of the model with its patches, and of what was written of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reknow.edits import Edit
from reknow.lm import LM

ASKED = 100
"""How many edits an export asks again: the first ones."""
LOST = 0.02
"""How much rounding to a type may cost, as a share of the unedited matrix's norm: four times what Q8_0 costs normally
distributed weights. Where the change is large beside the weights, more of them is lost, and other facts with them."""


@dataclass(frozen=True)
class Answer:
    """How a model reads an edit's new answer behind its prompt, teacher-forced."""

    probability: float | None
    """Of the whole answer; None where a wrecked model gives no number."""
    said: bool
    """Whether every token of it is the most likely one, given those before it."""


@dataclass(frozen=True)
class Measured:
    """The first edits of a model and how they are answered."""

    edits: tuple[Edit, ...]
    total: int
    """How many edits there are."""
    before: list[Answer]
    """The base's answers."""
    after: list[Answer]
    """Those of the model with its patches."""
    how: str
    """The dtype in which they were read and whether in the chat template, as a part of a sentence."""
    written: list[Answer] | None = None
    """Those of what was written, where it differs from the model in memory."""
    replaced: tuple[bool, ...] = ()
    """Of each, whether a later edit gives the same prompt another answer, so that this one is not expected."""

    @property
    def last(self) -> list[Answer]:
        """The answers of what was written, so far as they were read."""
        return self.after if self.written is None else self.written

    @property
    def held(self) -> int:
        """How many of the edits that were asked what was written says."""
        return sum(answer.said for answer in self.last)

    @property
    def missed(self) -> list[tuple[Edit, bool]]:
        """The edits that what was written should say and does not, each with whether the model in memory says it."""
        replaced = self.replaced or (False,) * len(self.edits)
        rows = zip(self.edits, self.after, self.last, replaced, strict=True)
        return [(edit, after.said) for edit, after, last, later in rows if not (last.said or later)]

    def as_written(self, answers: list[Answer] | None) -> Measured:
        """With the answers of what was written."""
        return replace(self, written=answers)


def ask(lm: LM, edits: Sequence[Edit]) -> list[Answer]:
    """How the model, as it is, answers each edit."""
    if not edits:
        return []
    asked = [[edit.text for edit in edits], [edit.target_new for edit in edits], [edit.separator for edit in edits]]
    return [Answer(None if math.isnan(score.nll) else score.probability, score.said) for score in lm.score(*asked)]


def all_edits(lm: LM) -> tuple[Edit, ...]:
    """The edits of the applied patches, in order."""
    return tuple(edit for patch in lm.patches for edit in patch.edits)


def measure(lm: LM) -> Measured:
    """The first edits of the applied patches, asked of the base and of the model with the patches."""
    edits = all_edits(lm)
    first = edits[:ASKED]
    with lm.unpatched():
        before = ask(lm, first)
    how = str(lm.dtype).removeprefix("torch.") + (", in the chat template" if lm.chat else "")
    newest = {edit.text: edit.target_new for edit in edits}
    replaced = tuple(newest[edit.text] != edit.target_new for edit in first)
    return Measured(first, len(edits), before, ask(lm, first), how, replaced=replaced)
