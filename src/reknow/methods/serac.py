"""SERAC: edits stay in a memory; a question in the scope of one goes to a second model that reads that edit first.
(Mitchell et al. 2022, arXiv 2206.06520)

    f(x) = h(z, x)   where z = argmax over the memory of p(z, x), if p(z, x) > threshold
           base(x)   otherwise

The scope classifier p and the counterfactual model h are trained on cases with questions inside and outside the scope
of an edit, each with its own loss: scope_loss, and the answer's mean −log P. The base model is never touched: h is a
low-rank change of it, or of another decoder, that is in use only while it answers. The parts stand in
`reknow.memories.serac`: what is trained in `models`, how in `cases` and `learner`, and the choice of z in `memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from reknow.checks.bounds import Formerly, Number, Rate, Share
from reknow.contract import check_edits
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.files.schema import Count, Listed, Strict
from reknow.learning.editors import open_editor, trained_settings
from reknow.learning.learned import Learned
from reknow.learning.training import Learner, Split, Training
from reknow.lm import LM
from reknow.memories.base import MemoryMethod, memory_patch, paraphrases, resolve_conflicts
from reknow.memories.serac.learner import LearnerSettings, ScopeLearner
from reknow.memories.serac.memory import EditMemory
from reknow.memories.serac.models import ScopeAndCounterfactual, TrainedSettings
from reknow.model.exact import finite_loss
from reknow.patching.memory import versions
from reknow.patching.patches import Patch
from reknow.patching.record import PatchKind
from reknow.patching.state_spec import StateSpec
from reknow.registry import make


class VersionFields(Strict):
    """What a version knows besides its tensors."""

    replaces: Listed[Count]
    """Stored edits, counted over all versions, whose place these take."""
    digests: Listed[str | None]
    """Digests of the encoder and of the counterfactual model; None where the base model is it."""


@dataclass(frozen=True)
class SERAC(TrainedSettings, Learned, MemoryMethod):
    """An edit memory with a scope classifier and a counterfactual model, both trained. Needs no subject."""

    kind: ClassVar[PatchKind] = "router"
    needs_knowledge: ClassVar[bool] = True
    state_spec: ClassVar[StateSpec] = StateSpec(
        {
            "keys": "float32 texts embedding_size",
            "owners": "int64 texts",
            "scope.attention.weight?": "float pooling_queries features",
            "scope.value.weight?": "float embedding_size features",
            "left.*?": "float out.* rank",
            "right.*?": "float rank in.*",
            "scope.*?": "float …",
            "cross.*?": "float …",
        },
        VersionFields,
        settings=("embedding_size", "pooling_queries", "rank"),
    )

    threshold: Share = 0.5
    """A question is in scope where p is above."""
    candidates: Number = 8
    """Edits per question that the cross classifier judges."""
    approximate: bool = False
    """Search the memory with faiss, for very many edits."""
    learning_rate: Rate = 5e-3
    """Learning rate of Adam in the training."""
    max_questions: Annotated[Number, Formerly("answered")] = 32
    """Questions of a batch, at most, that the counterfactual model learns to answer; fewer make a step cheaper."""

    training: ClassVar[Training] = Training(
        steps=400, batch_size=32, warmup=20, decay=True, validate_every=100, patience=6
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.threshold < 1:
            raise InputError(f"expected 0 < threshold < 1; got {self.threshold}: correct it")

    @property
    def name(self) -> str:
        return "serac"

    def learner(self, lm: LM, cases: Split, training: Training) -> Learner:
        settings = LearnerSettings(self.learning_rate, self.max_questions, self.threshold)
        return ScopeLearner(ScopeAndCounterfactual(self, lm), lm, cases, settings)

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits, lm)
        stored = versions(lm.patches, self.name)
        trained = self._trained(lm, stored)
        modules = ScopeAndCounterfactual(self, lm, trained)
        texts = list(map(paraphrases, edits))
        replaced = EditMemory(lm, stored).conflicts(edits) if stored else []
        notes: dict[str, Any] = {"conflicts": resolve_conflicts(self, [(old, new) for _, old, new in replaced])}
        # Read as it will be: an edit too long with a question behind it, or a broken model, is refused here.
        notes["loss"] = finite_loss(modules.answer_loss([(edit, edit.text) for edit in edits]))
        keys = modules.embed([text for own in texts for text in own])
        owners = torch.tensor([i for i, own in enumerate(texts) for _ in own])
        state = {"keys": keys, "owners": owners, **({} if stored else trained)}
        memory = {"replaces": sorted({i for i, _, _ in replaced}), "digests": modules.digests}
        return memory_patch(self, lm, edits, state, memory=memory, notes=notes)

    def _trained(self, lm: LM, stored: Sequence[Patch]) -> dict[str, Tensor]:
        """What was learned: by the editor, and kept in the first version of a memory."""
        if stored:
            settings, tensors = make(self.name, stored[0].settings), stored[0].state
            begin, remedy = "the memory was begun", "take the memory off first"
        else:
            editor = open_editor(self.name, self.editor, lm)
            settings, tensors = trained_settings(editor), editor.tensors
            begin, remedy = "the editor was trained", "train another with `reknow train serac`"
        if name := self.difference(settings):
            raise InputError(
                f"expected {name}={getattr(settings, name)}, with which {begin}; got {getattr(self, name)}: "
                f"change it, or {remedy}"
            )
        return tensors

    @staticmethod
    def running_memory(lm: LM, patches: Sequence[Patch]) -> EditMemory:
        return EditMemory(lm, patches)
