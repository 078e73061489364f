"""InstructEdit: instruction-based knowledge editing. Zhang et al. 2024, arXiv 2402.16123.

One editor for several kinds of edits. An editor that learns them all gets in its own way, because it cannot tell them
apart; an instruction in front of the edit tells it.

    Task: ConvSent / Description: Teach the chatbot to … / Input: What do you think of Lima?   →   target      (§3.1)

The editor is MEND's: a network that turns the gradient of the target behind this text into a change of the weights.
It is trained on all tasks in turn, each case behind an instruction drawn from those of its task (§3.3).

    ΔW = −α Σ_tokens δ̃ ũᵀ,   [ũ; δ̃] = network([u; δ]),   loss = c_e · L_edit + L_loc

The article writes δ / ‖δ‖ for δ: of each token's gradient the direction is kept and the length, how wrong the model
was there, is dropped, so that every token weighs alike. Its code takes δ as it is, and so does this one by default;
`normalize_gradient` is the article's form.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from typing_extensions import Self

from reknow.checks.bounds import Name
from reknow.datasets.families import Family, family_of, load_families
from reknow.edits import Case, Edit
from reknow.learning.gradient_network import TransformLearner, transform_gradients
from reknow.learning.settings import Changes, NetworkSettings, Tensors
from reknow.learning.training import Draw, Learner, Split, Training, interleave
from reknow.lm import LM
from reknow.model.tokens import Text


@dataclass(frozen=True)
class InstructEdit(NetworkSettings):
    """MEND's network for several tasks at once, which learns from an instruction which one it is."""

    families: Name | None = None
    """File of task families with their instructions; None: the bundled one."""
    instructed: bool = True
    """Whether an instruction stands in front of every edit; False: multi-task editing without, to compare with. A
    trained editor brings its own choice."""
    balanced: bool = True
    """Whether the tasks take turns in training; False: they come as often as they have cases."""

    @property
    def name(self) -> str:
        return "instructedit"

    def learner(self, lm: LM, cases: Split, training: Training) -> Learner:
        """What learns from cases of the task families. A case's family is its edit's `task`, or that of the data set
        which its id names."""
        families = load_families(self.families)

        def prepare(batch: Sequence[Case], rng: random.Random) -> list[Case]:
            return [self.instruct(case, families, rng) for case in batch]

        return TransformLearner(self, lm, cases, training, prepare)

    def transform(self, lm: LM, edits: Sequence[Edit], trained: Self, tensors: Tensors) -> Changes:
        """The change of edits that have an instruction, or a task whose first instruction is then taken."""
        families = load_families(self.families)
        instructed = [trained.instruct(Case(edit), families).edit for edit in edits]
        texts = [Text.asked(edit, edit.instructed(edit.text)) for edit in instructed]
        return transform_gradients(lm, trained, tensors, texts)

    def instruct(self, case: Case, families: Mapping[str, Family], rng: random.Random | None = None) -> Case:
        """The case behind its own instruction, or else one of its task that may be trained on, the first without
        `rng`; bare where the editor reads none."""
        if not self.instructed:
            return replace(case, edit=replace(case.edit, instruction=None))
        if case.edit.instruction is not None:
            return case
        family = family_of(case.edit, families)
        texts = family.texts()
        return family.instruct(case, texts[0] if rng is None else rng.choice(texts))

    def draw(self, train_cases: Sequence[Case], training: Training) -> Draw:
        if not self.balanced:
            return super().draw(train_cases, training)
        families = load_families(self.families)
        tasks: dict[str | None, list[Case]] = {}
        for case in train_cases:
            own = case.edit.instruction is not None
            tasks.setdefault(case.edit.task if own else family_of(case.edit, families).title, []).append(case)
        return interleave(list(tasks.values()), training)
