"""SERAC: edits stay in a memory; a question in the scope of one goes to a second model that reads that edit first.
(Mitchell et al. 2022, arXiv 2206.06520)

    f(x) = h(z, x)   where z = argmax over the memory of p(z, x), if p(z, x) > threshold
           base(x)   otherwise

The scope classifier p and the counterfactual model h are trained on cases with questions inside and outside the scope
of an edit, each with its own loss: scope_loss, and the answer's mean −log P. The base model is never touched: h is a
low-rank change of it, or of another decoder, that is in use only while it answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor

from reknow.checks.bounds import Formerly, Number, Rate, Share
from reknow.contract import check_edits
from reknow.edits import Edit
from reknow.errors import InputError, PatchError
from reknow.files.schema import Count, Listed, Strict
from reknow.learning.editors import open_editor, trained_settings
from reknow.learning.learned import Learned
from reknow.learning.training import Learner, Split, Training
from reknow.memories.base import MemoryMethod, memory_patch, resolve_conflicts
from reknow.memories.nearest import Nearest
from reknow.memories.scope import log_in_scope
from reknow.memories.scope_and_counterfactual import ScopeAndCounterfactual, TrainedSettings
from reknow.memories.scope_training import ScopeLearner
from reknow.model.exact import finite_loss
from reknow.patching.memory import Route, versions
from reknow.patching.patches import Patch
from reknow.patching.record import PatchKind
from reknow.patching.state_spec import StateSpec
from reknow.registry import make

if TYPE_CHECKING:
    from reknow.lm import LM


class Memory(Strict):
    """What a version knows besides its tensors."""

    replaces: Listed[Count]
    """Stored edits, counted over all versions, whose place these take."""
    digests: Listed[str | None]
    """Of the encoder and of the counterfactual model; None where the base model is it."""


@dataclass(frozen=True)
class SERAC(TrainedSettings, Learned, MemoryMethod):
    """An edit memory with a scope classifier and a counterfactual model, both trained. Needs no subject."""

    kind: ClassVar[PatchKind] = "router"
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
        Memory,
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
        return ScopeLearner(
            ScopeAndCounterfactual(self, lm),
            lm,
            cases.train,
            cases.validation,
            learning_rate=self.learning_rate,
            max_questions=self.max_questions,
            threshold=self.threshold,
        )

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits)
        stored = versions(lm.patches, self.name)
        trained = self._trained(lm, stored)
        modules = ScopeAndCounterfactual(self, lm, trained)
        texts = [[edit.text, *map(edit.fill, edit.rephrasings)] for edit in edits]
        replaced = EditMemory(lm, stored).conflicts(edits) if stored else []
        notes: dict[str, Any] = {"conflicts": resolve_conflicts(self, [(old, new) for _, old, new in replaced])}
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
            settings, tensors = trained_settings(type(self), editor), editor.tensors
            begin, remedy = "the editor was trained", "train another with `reknow train serac`"
        if name := self.difference(settings):
            raise InputError(
                f"expected {name}={getattr(settings, name)}, with which {begin}; got {getattr(self, name)}: "
                f"change it, or {remedy}"
            )
        return tensors

    @staticmethod
    def memory(lm: LM, patches: Sequence[Patch]) -> EditMemory:
        return EditMemory(lm, patches)


class EditMemory:
    """The running memory: sends a question in the scope of a stored edit to the counterfactual model."""

    def __init__(self, lm: LM, patches: Sequence[Patch]):
        methods = [make(patch.method, patch.settings) for patch in patches]
        self._method: SERAC = methods[-1]
        self._modules = ScopeAndCounterfactual(self._method, lm, patches[0].state)
        if self._modules.digests != patches[0].memory["digests"]:
            raise PatchError(
                f"expected the encoder and the counterfactual model of {patches[0].label}; got others at "
                f"{self._method.encoder} and {self._method.counterfactual}: put those back"
            )
        self.edits: list[Edit] = []
        owners: list[Tensor] = []
        for patch, method in zip(patches, methods, strict=True):
            own, known = patch.state["owners"], len(self.edits)
            whole = own.unique().tolist() == list(range(len(patch.edits)))
            if not whole or method.difference(self._method) or any(i >= known for i in patch.memory["replaces"]):
                raise PatchError(f"expected versions of one memory; {patch.label} is of another: make the edit again")
            owners.append(own + known)
            self.edits += patch.edits
        replaced = {i for patch in patches for i in patch.memory["replaces"]}
        self._current = [i for i in range(len(self.edits)) if i not in replaced]
        owner = torch.cat(owners)
        current = torch.isin(owner, torch.tensor(self._current))
        self._keys = torch.cat([patch.state["keys"] for patch in patches])[current].to(lm.device)
        self._owners = owner[current]

    @cached_property
    def _nearest(self) -> Nearest:
        return Nearest(self._keys, approximate=self._method.approximate)

    def route(self, lm: LM, prompts: Sequence[str]) -> list[Route | None]:
        routes: list[Route | None] = []
        for i, log_p, prompt in zip(*self.scopes(prompts), prompts, strict=True):
            in_scope = log_p > math.log(self._method.threshold)
            routes.append((self._modules, self._method.question(self.edits[i], prompt)) if in_scope else None)
        return routes

    def scopes(self, prompts: Sequence[str]) -> tuple[list[int], list[float]]:
        """z and log p(z, x) of each prompt: the stored edit that it most likely belongs to."""
        cross = self._method.classifier == "cross"
        queries = self._modules.embed(prompts)
        distances, places = self._nearest.search(queries, self._method.candidates if cross else 1)
        owners = self._owners[places.cpu()]  # (prompts, candidates)
        log_p = -distances / 2 if self._modules.cosine else -distances
        if cross:
            pairs = [(i, prompt) for row, prompt in zip(owners, prompts, strict=True) for i in row.tolist()]
            log_p = self.pairs(pairs).view(owners.shape)
        best = log_p.argmax(1, keepdim=True)
        return owners.gather(1, best.cpu())[:, 0].tolist(), log_p.gather(1, best)[:, 0].tolist()

    def pairs(self, asked: Sequence[tuple[int, str]]) -> Tensor:
        """log p that a question is in the scope of the stored edit of this index, for each pair. (pairs,)"""
        texts = [self.edits[i].text for i, _ in asked], [text for _, text in asked]
        if self._method.classifier == "cross":
            return self._modules.judge(*texts)
        vectors = zip(*map(self._modules.embed, texts), strict=True)
        return torch.cat([log_in_scope(x[None], z[None], cosine=self._modules.cosine)[0] for z, x in vectors])

    def conflicts(self, edits: Sequence[Edit]) -> list[tuple[int, Edit, Edit]]:
        """(index of a stored edit, that edit, the new edit) where the new one has another answer to the same prompt,
        or about the same subject and in the stored one's scope."""
        found = []
        for new, i in ((new, i) for new in edits for i in self._current):
            old, threshold = self.edits[i], math.log(self._method.threshold)
            if old.target_new != new.target_new and (
                old.text == new.text
                or (None is not new.subject == old.subject and float(self.pairs([(i, new.text)])) > threshold)
            ):
                found.append((i, old, new))
        return found
