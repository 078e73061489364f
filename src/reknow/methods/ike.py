"""IKE: Can We Edit Factual Knowledge by In-Context Learning? Zheng et al. 2023, arXiv 2305.12740.

    P(answer | d_1 … d_k, f, question)        d_i: another fact, a question about it, and its answer; f: the edit

A demonstration *copies* its fact (the question is the fact's own prompt), *updates* (a paraphrase, same new answer)
or *retains* (another subject, which keeps its old answer): 4, 12 and 16 of 32. They show the cases whose facts are
most like the edit, the most like it last; then comes the edit as a copy of itself; then the question.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from reknow.checks.bounds import Formerly, Name, Natural, Number, Seed
from reknow.datasets.cases import load_cases
from reknow.edits import Case, Edit, to_json
from reknow.errors import InputError, PatchError
from reknow.files.atomic import write_text
from reknow.files.digests import digest_now
from reknow.files.schema import Listed, Strict
from reknow.files.strict_json import strict_json
from reknow.lm import LM
from reknow.memories.base import MemoryMethod, begin, memory_patch
from reknow.memories.demonstrations import copy_of, demonstrations_of, fit_demonstrations, question_head, read_cases
from reknow.memories.embedding import embed_texts
from reknow.memories.nearest import Nearest
from reknow.model.tokens import Text
from reknow.patching.patches import Patch
from reknow.patching.record import PatchKind
from reknow.patching.state_spec import CountedBy, StateSpec
from reknow.registry import make

_BUNDLED, _OFFSET = "counterfact", 500
"""What is shown without cases of the user's: records from this one on; those before are for evaluation."""


class VersionFields(Strict):
    """What a version knows besides its tensors."""

    demonstrations: Annotated[Listed[Listed[str]], CountedBy("edits")]
    """Those of each edit, in the order in which they stand in the prompt."""


@dataclass(frozen=True)
class IKE(MemoryMethod):
    """In-context knowledge editing with retrieved demonstrations. Needs no subject."""

    kind: ClassVar[PatchKind] = "prompt"
    for_all = ("encoder",)
    needs_knowledge: ClassVar[bool] = True
    state_spec: ClassVar[StateSpec] = StateSpec({"keys": "float32 edits features"}, VersionFields)

    demonstrations: Natural = 32
    """How many demonstrations at most; 0: the edit alone stands before the question (zero-shot). Those that do not
    fit into the model's positions are left out, the least similar first."""
    demonstration_mix: Annotated[tuple[Natural, Natural, Natural] | None, Formerly("shares")] = (4, 12, 16)
    """Shares of copies, updates and retentions among the demonstrations. None: whatever is most similar, most similar
    first, and no copy of the edit itself, as in EasyEdit."""
    cases: Name | None = None
    """File of the cases that are shown, written by `fit`; None: the bundled records of CounterFact from 500 on. Cases
    about the edit's own subject are passed over."""
    encoder: Name | None = None
    """Folder or name of a sentence-transformers model that compares facts; None: the model's own hidden states."""
    answer_tokens: Annotated[Number, Formerly("room")] = 100
    """Tokens kept free behind the question for the answer."""
    seed: Seed = 0
    """Seed of which demonstration is of which kind, and which paraphrase it shows."""

    def __post_init__(self):
        super().__post_init__()
        if self.demonstration_mix is not None and not any(self.demonstration_mix):
            raise InputError(f"expected three shares that are not all 0; got {self.demonstration_mix}: correct them")

    @property
    def name(self) -> str:
        return "ike-zero" if not self.demonstrations else "ike" if self.demonstration_mix else "ike-easyedit"

    def fit(self, lm: LM, cases: Sequence[Case], out: str | Path) -> IKE:
        """Keeps the cases as demonstrations in the file `out`, and gives the method that shows them.

        Raises:
            InputError: there are no cases, one lacks a paraphrase or another fact, or the file cannot be written.
        """
        if not cases:
            raise InputError("expected cases to show; got none: give some, or edit without to show the bundled ones")
        for case in cases:
            demonstrations_of(case)
        lines = "".join(strict_json(to_json(case), ensure_ascii=False) + "\n" for case in cases)
        return replace(self, cases=str(write_text(out, lines)))

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits, _, notes = begin(self, lm, edits)
        prompts = [question_head(edit) + edit.text for edit in edits]
        lm.check_length(lm.encode([Text.asked(edit, text) for edit, text in zip(edits, prompts, strict=True)]))
        chosen = self._choose(lm, edits) if self.demonstrations else [[] for _ in edits]
        shown = [self.fit_demonstrations(lm, texts, text) for texts, text in zip(chosen, prompts, strict=True)]
        notes["demonstrations"] = [len(texts) for texts in shown]
        if notes["demonstrations"] != [len(texts) for texts in chosen]:
            notes["left_out"] = f"{lm.name} has positions for no more of {self.demonstrations} demonstrations"
        keys = embed_texts(lm, [edit.text for edit in edits], self.encoder)
        return memory_patch(self, lm, edits, {"keys": keys}, memory={"demonstrations": shown}, notes=notes)

    def fit_demonstrations(self, lm: LM, texts: Sequence[str], prompt: str) -> list[str]:
        """Those that leave positions for the prompt and its answer, the least similar left out."""
        return fit_demonstrations(lm, texts, prompt, self.answer_tokens, nearest_first=self.demonstration_mix is None)

    def _choose(self, lm: LM, edits: Sequence[Edit]) -> list[list[str]]:
        """Demonstrations for each edit, in the order in which they stand in the prompt."""
        cases, vectors = self._pool(lm)
        mixed = self.demonstration_mix is not None
        queries = [edit.text if mixed else question_head(edit) + edit.text for edit in edits]
        _, indices = Nearest(vectors).search(embed_texts(lm, queries, self.encoder), len(vectors))
        chosen = []
        for edit, order in zip(edits, indices.tolist(), strict=True):
            others = [cases[i] for i in order if edit.subject is None or cases[i][0].edit.subject != edit.subject]
            near = [pair for pair in others if pair[0].edit.text != edit.text][: self.demonstrations]
            chosen.append(self._mix(near, edit))
        return chosen

    def _mix(self, near: list[tuple[Case, str]], edit: Edit) -> list[str]:
        """Copies, updates and retentions of these cases, the most similar last, and the edit as a copy of itself."""
        if self.demonstration_mix is None:
            return [text for _, text in near]
        rng = random.Random(f"{self.seed}/{edit.text}")
        smallest = math.gcd(*self.demonstration_mix)
        block = [kind for kind, share in enumerate(self.demonstration_mix) for _ in range(share // smallest)]
        kinds: list[int] = []
        while len(kinds) < len(near):  # block by block, so that those that fit are mixed in proportion too
            rng.shuffle(block)
            kinds += block
        mixed = [rng.choice(demonstrations_of(case)[kind]) for (case, _), kind in zip(near, kinds, strict=False)]
        return [*reversed(mixed), copy_of(edit)]

    def _pool(self, lm: LM) -> tuple[list[tuple[Case, str]], Tensor]:
        """What can be shown, a case with a text, and the vectors to find it by; read once for an LM."""

        def read() -> tuple[list[tuple[Case, str]], Tensor]:
            cases = load_cases(_BUNDLED, offset=_OFFSET) if self.cases is None else read_cases(self.cases)
            pool = [(case, case.edit.text) for case in cases]
            if self.demonstration_mix is None:
                pool = [(case, text) for case in cases for texts in demonstrations_of(case) for text in texts[:1]]
            return pool, embed_texts(lm, [text.strip() for _, text in pool], self.encoder)

        file = Path(self.cases) if self.cases else None  # another may be written under its name
        content = digest_now(file) if file and file.is_file() else self.cases
        return lm.cached(("ike", content, self.encoder, self.demonstration_mix is None), read)

    @staticmethod
    def running_memory(lm: LM, patches: Sequence[Patch]) -> _Contexts:
        return _Contexts(patches)


class _Contexts:
    """The running memory: puts before a question the context of the edit most like it, the newest of its prompt."""

    def __init__(self, patches: Sequence[Patch]):
        newest: dict[str, tuple[Edit, list[str], Tensor]] = {}
        for patch in patches:
            rows = zip(patch.edits, patch.memory["demonstrations"], patch.state["keys"], strict=True)
            newest |= {edit.text: (edit, shown, key) for edit, shown, key in rows}
        self._edits = [(edit, shown) for edit, shown, _ in newest.values()]
        self._keys = torch.stack([key for _, _, key in newest.values()])
        self._method = make(patches[-1].method, patches[-1].settings)

    def prompts(self, lm: LM, texts: Sequence[str]) -> list[str]:
        """Each question behind its context."""
        nearest = [0] * len(texts)
        if len(self._edits) > 1:
            queries = embed_texts(lm, texts, self._method.encoder)
            if queries.shape[1] != self._keys.shape[1]:
                raise PatchError(
                    f"expected facts kept as {queries.shape[1]} numbers, as {self._method.encoder or lm.name} gives "
                    f"them; got {self._keys.shape[1]}: make the edits again"
                )
            nearest = Nearest(self._keys.to(lm.device)).search(queries)[1][:, 0].tolist()
        prompts = []
        for text, (edit, shown) in zip(texts, (self._edits[i] for i in nearest), strict=True):
            prompt = question_head(edit) + text
            prompts.append("".join([*self._method.fit_demonstrations(lm, shown, prompt), prompt]))
        return prompts
