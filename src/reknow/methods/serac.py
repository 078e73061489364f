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
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from reknow.checks.bounds import Formerly, Name, Number, Rank, Rate, Share
from reknow.contract import checked
from reknow.editing.descent import Scored, predicted
from reknow.edits import Case, Edit
from reknow.errors import InputError, PatchError
from reknow.files.schema import Count, Listed, Strict
from reknow.learning.editors import Editor, open_editor, trained_settings
from reknow.learning.learned import Learned
from reknow.learning.loop import seeded
from reknow.learning.training import Learner, Training
from reknow.memories.base import MemoryMethod, memory_patch, settled
from reknow.memories.nearest import Nearest
from reknow.memories.scope import TEXTS, Cross, Embedding, States, log_in_scope, token_states
from reknow.memories.scope_training import ScopeLearner
from reknow.model.exact import finite_loss
from reknow.model.hooks import forwards_replaced
from reknow.model.tokens import Text
from reknow.patching.deltas import LowRank
from reknow.patching.memory import Route, versions
from reknow.patching.patches import Patch
from reknow.patching.record import PatchKind
from reknow.patching.state_spec import StateSpec
from reknow.patching.weights import with_unmerged
from reknow.registry import make

if TYPE_CHECKING:
    from reknow.lm import LM, Score

TRAINED = ("classifier", "encoder", "counterfactual", "template", "embedding_size", "pooling_queries", "rank")
"""Fields that an editor is trained with, which an edit cannot change."""


class Memory(Strict):
    """What a version knows besides its tensors."""

    replaces: Listed[Count]
    """Stored edits, counted over all versions, whose place these take."""
    digests: Listed[str | None]
    """Of the encoder and of the counterfactual model; None where the base model is it."""


@dataclass(frozen=True)
class SERAC(Learned, MemoryMethod):
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
    classifier: Literal["embedding", "cosine", "cross"] = "embedding"
    """p = exp(−‖a − b‖²) of two learned vectors, exp(cos − 1) of them, or a small transformer that reads edit and
    question together, for those of the `candidates` that the first kind finds."""
    candidates: Number = 8
    """Edits per question that the cross classifier judges."""
    approximate: bool = False
    """Search the memory with faiss, for very many edits."""
    conflict: Literal["update", "refuse"] = "update"
    """What to do with an edit that gives a stored one another answer: replace that one, or refuse. That is: the same
    prompt, or the same subject and in its scope."""
    encoder: Name | None = None
    """Folder or name of a Hugging Face encoder whose token states the classifier reads; None: the base model's."""
    counterfactual: Name | None = None
    """Folder or name of a decoder with the same tokenizer that answers in scope; None: the base model itself, both
    with a trained low-rank change."""
    template: str = "Fact: {edit} {answer}. {input}"
    """What the counterfactual model reads; the paper: `{edit} {answer} {input}`."""
    embedding_size: Annotated[Rank, Formerly("size")] = 64
    """Numbers in a vector."""
    pooling_queries: Annotated[Number, Formerly("queries")] = 4
    """Learned queries that gather it, each a share of the numbers."""
    rank: Rank = 8
    """Of the counterfactual model's change of every value matrix."""
    learning_rate: Rate = 5e-3
    """Of Adam."""
    max_questions: Annotated[Number, Formerly("answered")] = 32
    """Questions of a batch, at most, that the counterfactual model learns to answer; fewer make a step cheaper."""

    training: ClassVar[Training] = Training(
        steps=400, batch_size=32, warmup=20, decay=True, validate_every=100, patience=6
    )

    def __post_init__(self):
        super().__post_init__()
        rest = re.sub(r"\{(edit|answer|input)\}", "", self.template)  # a format could ask for a gigabyte of spaces
        if not all(part in self.template for part in ("{edit}", "{answer}", "{input}")) or set("{}") & set(rest):
            raise InputError(
                f"expected a template with {{edit}}, {{answer}} and {{input}} and no other braces; got "
                f"{self.template!r}: correct it"
            )
        if not 0 < self.threshold < 1 or self.embedding_size % self.pooling_queries:
            raise InputError(
                "expected 0 < threshold < 1 and an embedding_size that is a multiple of pooling_queries; "
                f"got {self.threshold}, {self.embedding_size} and {self.pooling_queries}: correct them"
            )

    @property
    def name(self) -> str:
        return "serac"

    def learner(
        self, lm: LM, train_cases: Sequence[Case], validation_cases: Sequence[Case], training: Training
    ) -> Learner:
        return ScopeLearner(self, Modules(self, lm), lm, train_cases, validation_cases)

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = checked(self, edits)
        stored = versions(lm.patches, self.name)
        begun = {} if stored else self._trained(lm)
        if stored:
            begun_by = make(self.name, stored[0].settings)
            if changed := [name for name in TRAINED if getattr(begun_by, name) != getattr(self, name)]:
                raise InputError(
                    f"expected the settings that the memory was begun with; got another {changed[0]}: set "
                    f"{changed[0]}={getattr(begun_by, changed[0])}, or take the memory off first"
                )
        modules = Modules(self, lm, stored[0].state if stored else begun)
        texts, owners = _wordings(edits)
        keys = modules.embed(texts)
        clashes = EditMemory(lm, stored).conflicts(edits) if stored else []
        told = [({"prompt": old.text, "old": old.target_new, "new": new.target_new}, new) for _, old, new in clashes]
        replaced = settled(self, told, self.conflict)
        with lm.unpatched(), torch.no_grad():
            asked = [Text.asked(edit, self.question(edit, edit.text)) for edit in edits]
            parts = [modules.answers(asked[start : start + TEXTS]) for start in range(0, len(asked), TEXTS)]
            loss = finite_loss(torch.cat(parts).mean())
        state = {"keys": keys.cpu(), "owners": torch.tensor(owners), **{n: t.cpu() for n, t in begun.items()}}
        memory = {"replaces": sorted({i for i, _, _ in clashes}), "digests": modules.digests}
        notes = {"conflicts": replaced, "loss": loss}
        return memory_patch(self, lm, edits, state, memory=memory, notes=notes)

    @staticmethod
    def memory(lm: LM, patches: Sequence[Patch]) -> EditMemory:
        return EditMemory(lm, patches)

    def question(self, edit: Edit, text: str) -> str:
        """What the counterfactual model reads."""
        template = self.template.replace("{edit} {answer}", "{stated}")
        stated = edit.answered(edit.text, edit.target_new)
        return template.format(edit=edit.text, answer=edit.target_new, stated=stated, input=text)

    def _trained(self, lm: LM) -> dict[str, Tensor]:
        editor: Editor = open_editor(self.name, self.editor, lm)
        trained = trained_settings(type(self), editor)
        for name in TRAINED:
            if getattr(trained, name) != getattr(self, name):
                raise InputError(
                    f"expected {name}={getattr(trained, name)}, with which the editor was trained; got "
                    f"{getattr(self, name)}: change it, or train another with `reknow train serac`"
                )
        return editor.tensors


class Modules(nn.Module):
    """What is trained: the classifier, and the counterfactual model's change; answers in scope."""

    def __init__(self, method: SERAC, lm: LM, tensors: dict[str, Tensor] | None = None):
        super().__init__()
        self._states = token_states(lm, method.encoder)
        self._reader = counterfactual_model(lm, method.counterfactual)
        self.digests = [self._states.digest, None if self._reader is lm else self._reader.fingerprint.digest]
        self._names = list(self._reader.parts.value)
        with seeded("serac", method.embedding_size, method.rank):
            self.cosine = method.classifier == "cosine"
            self.scope = Embedding(self._states.features, method.embedding_size, method.pooling_queries)
            self.cross = Cross(self._states.features) if method.classifier == "cross" else None
            shapes = [tuple(self._reader.weight(name).shape) for name in self._names]
            self.left = nn.ParameterList([torch.zeros(out, method.rank) for out, _ in shapes])
            self.right = nn.ParameterList([torch.randn(method.rank, wide) * wide**-0.5 for _, wide in shapes])
        if tensors is not None:
            own = self.state_dict()
            if odd := [n for n in own if n not in tensors or tensors[n].shape != own[n].shape]:
                raise InputError(f"expected what these settings learn; {odd[0]} is of another size: train anew")
            self.load_state_dict({name: tensors[name].float() for name in own})
            self.requires_grad_(False)
        self.to(lm.device)

    def states(self, texts: Sequence[str]) -> States:
        return self._states(texts)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """A vector for each text, of length 1 where cosines count. (texts, size)"""
        parts = [self.scope(self.states(texts[start : start + TEXTS])) for start in range(0, len(texts), TEXTS)]
        vectors = torch.cat(parts)
        return nn.functional.normalize(vectors, dim=-1) if self.cosine else vectors

    @torch.no_grad()
    def judge(self, edits: Sequence[str], inputs: Sequence[str]) -> Tensor:
        """log p of each pair by the cross classifier. (pairs,)"""
        assert self.cross is not None
        starts = range(0, len(edits), TEXTS)
        parts = [(edits[at : at + TEXTS], inputs[at : at + TEXTS]) for at in starts]
        return torch.cat([self.cross(self.states(first), self.states(second)) for first, second in parts])

    @contextmanager
    def counterfactual(self):
        """While open, the counterfactual model, its change computed beside its matrices: they stay as they are."""
        with self._reader.unpatched():
            modules = [self._reader.model.get_submodule(name) for name in self._names]
            changes = (LowRank(left, right) for left, right in zip(self.left, self.right, strict=True))
            with forwards_replaced(
                {m: with_unmerged(m.forward, change) for m, change in zip(modules, changes, strict=True)}
            ):
                yield self._reader

    def answers(self, questions: Sequence[Text]) -> Tensor:
        """−log P of the answers' tokens under the counterfactual model, with gradients. (tokens,)"""
        with self.counterfactual() as reader:
            rows = reader.encode(questions)
            return Scored(reader, rows, [predicted(row, row.prompt_length) for row in rows], None).nll()

    def score(
        self, prompts: Sequence[str], targets: Sequence[str], separators: Sequence[str | None] | None = None
    ) -> list[Score]:
        with self.counterfactual() as reader:
            return reader.score(prompts, targets, separators)

    def generate(self, prompts: Sequence[str], max_new_tokens: int, **sampling: Any) -> list[str]:
        with self.counterfactual() as reader:
            return list(reader.generate(list(prompts), max_new_tokens, **sampling))


class EditMemory:
    """The running memory: sends a question in the scope of a stored edit to the counterfactual model."""

    def __init__(self, lm: LM, patches: Sequence[Patch]):
        methods = [make(patch.method, patch.settings) for patch in patches]
        self._method: SERAC = methods[-1]
        self._modules = Modules(self._method, lm, patches[0].state)
        if self._modules.digests != patches[0].memory["digests"]:
            raise PatchError(
                f"expected the encoder and the counterfactual model of {patches[0].label}; got others at "
                f"{self._method.encoder} and {self._method.counterfactual}: put those back"
            )
        self.edits = [edit for patch in patches for edit in patch.edits]
        replaced = {i for patch in patches for i in patch.memory["replaces"]}
        self._stored = [i for i in range(len(self.edits)) if i not in replaced]
        keys, owners, before = [], [], 0
        for patch, method in zip(patches, methods, strict=True):
            own = patch.state["owners"].unique().tolist() == list(range(len(patch.edits)))
            alike = all(getattr(method, name) == getattr(self._method, name) for name in TRAINED)
            if not own or not alike or any(i >= before for i in patch.memory["replaces"]):
                raise PatchError(f"expected versions of one memory; {patch.label} is of another: make the edit again")
            keys.append(patch.state["keys"])
            owners.append(patch.state["owners"] + before)
            before += len(patch.edits)
        owner = torch.cat(owners)
        kept = torch.isin(owner, torch.tensor(self._stored))
        self._keys, self._owners = torch.cat(keys)[kept].to(lm.device), owner[kept]

    @cached_property
    def _nearest(self) -> Nearest:
        return Nearest(self._keys, approximate=self._method.approximate)

    def route(self, lm: LM, prompts: Sequence[str]) -> list[Route | None]:
        routes: list[Route | None] = []
        for place, log_p, prompt in zip(*self.scopes(prompts), prompts, strict=True):
            inside = log_p > math.log(self._method.threshold)
            routes.append((self._modules, self._method.question(self.edits[place], prompt)) if inside else None)
        return routes

    def scopes(self, prompts: Sequence[str]) -> tuple[list[int], list[float]]:
        """The stored edit that each prompt most likely belongs to, and log p."""
        cross = self._method.classifier == "cross"
        distances, places = self._nearest.search(
            self._modules.embed(prompts), self._method.candidates if cross else 1
        )
        owners = self._owners[places.cpu()]  # (prompts, candidates)
        log_p = -distances / 2 if self._method.classifier == "cosine" else -distances
        if cross:
            pairs = [(self.edits[i].text, prompt) for row, prompt in zip(owners, prompts, strict=True) for i in row]
            log_p = self._modules.judge(*map(list, zip(*pairs, strict=True))).view(owners.shape)
        best = log_p.argmax(1, keepdim=True)
        return owners.gather(1, best.cpu())[:, 0].tolist(), log_p.gather(1, best)[:, 0].tolist()

    def pairs(self, asked: Sequence[tuple[int, str]]) -> Tensor:
        """log p that a question is in the scope of the stored edit of this index, for each pair. (pairs,)"""
        texts = [self.edits[i].text for i, _ in asked], [text for _, text in asked]
        if self._method.classifier == "cross":
            return self._modules.judge(*texts)
        edits, inputs = (self._modules.embed(each) for each in texts)
        cosine = self._modules.cosine
        return torch.cat(
            [log_in_scope(b[None], a[None], cosine=cosine)[0] for a, b in zip(edits, inputs, strict=True)]
        )

    def conflicts(self, edits: Sequence[Edit]) -> list[tuple[int, Edit, Edit]]:
        """(index of a stored edit, that edit, the new edit that gives it another answer)."""
        found = []
        for edit in edits:
            for i in self._stored:
                other = self.edits[i]
                same = edit.subject is not None and other.subject == edit.subject
                if other.target_new == edit.target_new or not (same or other.text == edit.text):
                    continue
                if other.text == edit.text or float(self.pairs([(i, edit.text)])) > math.log(self._method.threshold):
                    found.append((i, other, edit))
        return found


def counterfactual_model(lm: LM, source: str | None) -> LM:
    """The decoder that answers in scope; kept with the LM.

    Raises:
        InputError: it has another tokenizer.
    """
    if source is None:
        return lm

    def opened() -> LM:
        reader = type(lm)(source, dtype=lm.dtype, device=lm.device, chat=lm.chat)
        if reader.fingerprint.tokenizer != lm.fingerprint.tokenizer:
            raise InputError(
                f"expected a counterfactual model with the tokenizer of {lm.name}; {source} has another, so that its "
                "scores could not be compared: choose one of the same family"
            )
        return reader

    return lm.cached(("counterfactual", source), opened)


def _wordings(edits: Sequence[Edit]) -> tuple[list[str], list[int]]:
    """All prompts under which the edits are stored, and the edit that each belongs to."""
    pairs = [(text, i) for i, edit in enumerate(edits) for text in (edit.text, *map(edit.fill, edit.rephrasings))]
    return [text for text, _ in pairs], [i for _, i in pairs]
