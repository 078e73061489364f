"""InstructEdit: instruction-based knowledge editing. Tian et al. 2024, arXiv 2402.16123.

One editor for several kinds of edits. An editor that learns them all gets in its own way, because it cannot tell them
apart; an instruction in front of the edit tells it.

    Task: ConvSent / Description: Teach the chatbot to … / Input: What do you think of Lima?   →   target      (§3.1)

The editor is MEND's: a network that turns the gradient of the target behind this text into a change of the weights.
It is trained on all tasks in turn, each case behind an instruction drawn from those of its task (§3.3).

    ΔW = −α Σ_tokens δ̃ ũᵀ,   [ũ; δ̃] = network([u; δ / ‖δ‖]),   loss = c_e · L_edit + L_loc
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from reknow.edits import Case, Edit
from reknow.instructions.families import Family, family_of, load_families
from reknow.learning.editors import open_editor
from reknow.learning.training import Draw, Training, in_turn, split, train
from reknow.learning.transform import TransformLearner, last_layers, transformed
from reknow.methods.base import Learned, checked, weights_patch
from reknow.patches import Patch
from reknow.tokens import Text

if TYPE_CHECKING:
    from reknow.lm import LM


@dataclass(frozen=True)
class InstructEdit(Learned):
    """MEND's network for several tasks at once, told by an instruction which one it is."""

    editor: str | None = None
    """File or folder of the trained editor; None: the one that is bundled for the model. The editor brings along
    `instructed` and the settings of its network."""
    families: str | None = None
    """File of task families with their instructions; None: the bundled one."""
    instructed: bool = True
    """An instruction stands in front of every edit; False: multi-task editing without, to compare with."""
    balanced: bool = True
    """The tasks take turns in training; False: they come as often as they have cases."""
    unit_gradient: bool = False
    """Every token's δ is scaled to length 1 first, as the article says; its released code does not."""
    layers: tuple[int, ...] | None = None
    """Layers whose MLP matrices are changed; None: the last three."""
    rank: int = 1920
    """Of the network's matrices, at most their width."""
    edits_together: int = 1
    """Edits that are made at once in training."""
    edit_weight: float = 0.1
    """c_e, of the edit loss against the locality loss."""
    step_size: float = 1e-2
    """α at the start, in units of each matrix's root mean square."""
    step_size_rate: float = 1e-3
    """Learning rate of α, in the same unit."""
    learning_rate: float = 1e-4
    """Of Adam, for the network."""
    seed: int = 0
    """Of the network's first weights."""

    training: ClassVar[Training] = Training(
        steps=2000, batch_size=8, clip_norm=100.0, validate_every=200, checkpoint_every=200
    )

    @property
    def name(self) -> str:
        return "instructedit"

    def fit(
        self,
        lm: LM,
        cases: Sequence[Case],
        out: str | Path,
        training: Training | None = None,
        *,
        progress: bool = False,
    ) -> InstructEdit:
        """Trains on cases of the task families; see `Learned.fit`. A case's family is its edit's `task`, or that of
        the data set which its id names."""
        training = training or self.training
        families = load_families(self.families)
        learning, held = split(cases, training)
        method = replace(self, editor=None, layers=last_layers(lm, self.layers))
        learner = TransformLearner(
            method, lm, training.batch_size, lambda batch, chance: [self.told(c, families, chance) for c in batch]
        )
        draw = self._in_turn(learning, families, training) if self.balanced else None
        path = train(method, lm, learner, learning, held, out, training, draw=draw, progress=progress)
        return replace(self, editor=path)

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        """The patch of edits that have an instruction, or a task whose first instruction is then taken."""
        edits = checked(self, edits, subject=False)
        editor = open_editor(self, lm)
        layers = tuple(editor.settings["layers"])
        trained = InstructEdit(**{**editor.settings, "layers": layers})
        families = load_families(self.families)
        told = [trained.told(Case(edit), families).edit for edit in edits]
        texts = [Text(edit.instructed(edit.text), edit.target_new) for edit in told]
        deltas, loss = transformed(lm, trained, editor.tensors, texts)
        return weights_patch(self, lm, edits, deltas, notes={"layers": list(layers), "loss": loss})

    def told(self, case: Case, families: Mapping[str, Family], chance: random.Random | None = None) -> Case:
        """The case behind its own instruction, or else one of its task that may be trained on, the first without
        `chance`; bare where the editor reads none."""
        if not self.instructed:
            return replace(case, edit=replace(case.edit, instruction=None))
        if case.edit.instruction is not None:
            return case
        family = family_of(case.edit, families)
        texts = family.texts()
        return family.instruct(case, texts[0] if chance is None else chance.choice(texts))

    def _in_turn(self, cases: Sequence[Case], families: Mapping[str, Family], training: Training) -> Draw:
        tasks: dict[str | None, list[Case]] = {}
        for case in cases:
            told = case.edit.instruction is not None
            tasks.setdefault(case.edit.task if told else family_of(case.edit, families).title, []).append(case)
        return in_turn(list(tasks.values()), training)
