"""IKE: the edit stands in the prompt, behind demonstrations of how to follow one.
(Zheng et al. 2023, arXiv 2305.12740)

    P(answer | d_1 … d_k, f, question)        d_i: another fact, a question about it, and its answer; f: the edit

A demonstration *copies* its fact (the question is the fact's own prompt), *updates* (a rephrasing, same new answer)
or *retains* (another subject, which keeps its old answer): 4, 12 and 16 of 32. They show the cases whose facts are
most like the edit, the most like it last; then comes the edit as a copy of itself; then the question.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from reknow.checks.bounds import Formerly, Name, Natural, Number, Seed
from reknow.contract import check_edits
from reknow.datasets.cases import load_cases
from reknow.edits import Case, Edit, Probe, to_json
from reknow.errors import InputError, PatchError
from reknow.files.atomic import write_text
from reknow.files.schema import FormatError, Listed, Strict, explain, parse_json, read_content
from reknow.memories.base import MemoryMethod, conflicts, memory_patch, resolve_conflicts
from reknow.memories.embedding import embed
from reknow.memories.nearest import Nearest
from reknow.model.tokens import Text
from reknow.patching.patches import Patch
from reknow.patching.record import PatchKind
from reknow.patching.state_spec import CountedBy, StateSpec
from reknow.registry import make
from reknow.texts.writing import join_texts

if TYPE_CHECKING:
    from reknow.lm import LM

BUNDLED, OFFSET = "counterfact", 500
"""What is shown without cases of the user's: records from this one on; those before are for evaluation."""


class Memory(Strict):
    """What a version knows besides its tensors."""

    demonstrations: Annotated[Listed[Listed[str]], CountedBy("edits")]
    """Of each edit, in the order in which they stand in the prompt."""


@dataclass(frozen=True)
class IKE(MemoryMethod):
    """In-context knowledge editing with retrieved demonstrations. Needs no subject."""

    kind: ClassVar[PatchKind] = "prompt"
    state_spec: ClassVar[StateSpec] = StateSpec({"keys": "float32 edits features"}, Memory)

    demonstrations: Natural = 32
    """How many at most; 0: the edit alone stands before the question (zero-shot). Those that do not fit into the
    model's positions are left out, the least similar first."""
    demonstration_mix: Annotated[tuple[Natural, Natural, Natural] | None, Formerly("shares")] = (4, 12, 16)
    """Of copies, updates and retentions. None: whatever is most similar, most similar first, and no copy of the edit
    itself, as in EasyEdit."""
    cases: Name | None = None
    """File of the cases that are shown, written by `fit`; None: the bundled records of CounterFact from 500 on. Cases
    about the edit's own subject are passed over."""
    encoder: Name | None = None
    """Folder or name of a sentence-transformers model that compares facts; None: the model's own hidden states."""
    answer_tokens: Annotated[Number, Formerly("room")] = 100
    """Tokens kept free behind the question for the answer."""
    seed: Seed = 0
    """Of which demonstration is of which kind, and which rephrasing it shows."""

    def __post_init__(self):
        super().__post_init__()
        if self.demonstration_mix is not None and not any(self.demonstration_mix):
            raise InputError(f"expected three shares that are not all 0; got {self.demonstration_mix}: correct them")

    @property
    def name(self) -> str:
        if self.demonstrations == 0:
            return "ike-zero"
        return "ike" if self.demonstration_mix is not None else "ike-easyedit"

    def fit(self, lm: LM, cases: Sequence[Case], out: str | Path) -> IKE:
        """Keeps the cases as demonstrations in the file `out`, and gives the method that shows them.

        Raises:
            InputError: there are no cases, one lacks a rephrasing or another fact, or the file cannot be written.
        """
        if not cases:
            raise InputError("expected cases to show; got none: give some, or edit without to show the bundled ones")
        for case in cases:
            _wordings(case)
        lines = "".join(json.dumps(to_json(case), ensure_ascii=False) + "\n" for case in cases)
        path = write_text(out, lines)
        return IKE(**{**asdict(self), "cases": str(path)})

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits)
        replaced = resolve_conflicts(self, conflicts(self, lm, edits))
        lm.check_length(lm.encode([Text.asked(edit, _tail(edit) + edit.text) for edit in edits]))
        facts = [edit.text for edit in edits]
        shown = self._demonstrations(lm, edits) if self.demonstrations else [[] for _ in edits]
        kept = [
            _fitting(lm, each, _tail(edit), edit.text, self.answer_tokens)
            for each, edit in zip(shown, edits, strict=True)
        ]
        notes = {"demonstrations": [len(each) for each in kept], "conflicts": replaced}
        if any(len(some) < len(each) for some, each in zip(kept, shown, strict=True)):
            notes["left_out"] = f"{lm.name} has positions for no more of {self.demonstrations} demonstrations"
        keys = embed(lm, facts, self.encoder).cpu()
        return memory_patch(self, lm, edits, {"keys": keys}, memory={"demonstrations": kept}, notes=notes)

    @staticmethod
    def memory(lm: LM, patches: Sequence[Patch]) -> Contexts:
        return Contexts(patches)

    def _demonstrations(self, lm: LM, edits: Sequence[Edit]) -> list[list[str]]:
        """Demonstrations for each edit, in the order in which they stand in the prompt."""
        cases, vectors = self._pool(lm)
        facts = [fact(edit) for edit in edits]
        queries = [
            edit.text if self.demonstration_mix is not None else f"New Fact: {stated}\nPrompt: {edit.text}"
            for edit, stated in zip(edits, facts, strict=True)
        ]
        _, places = Nearest(vectors).search(embed(lm, queries, self.encoder), len(vectors))
        found = []
        for edit, order in zip(edits, places.tolist(), strict=True):
            others = [i for i in order if cases[i][0].edit.subject != edit.subject or edit.subject is None]
            near = [i for i in others if cases[i][0].edit.text != edit.text][: self.demonstrations]
            found.append(self._worded([cases[i] for i in near], edit))
        return found

    def _worded(self, near: list[tuple[Case, str]], edit: Edit) -> list[str]:
        if self.demonstration_mix is None:
            return [text for _, text in near]
        chance = random.Random(f"{self.seed}/{edit.text}")
        unit = math.gcd(*self.demonstration_mix)
        block = [kind for kind, share in enumerate(self.demonstration_mix) for _ in range(share // unit)]
        kinds: list[int] = []
        while len(kinds) < len(near):  # block by block, so that those that fit are mixed in proportion too
            chance.shuffle(block)
            kinds += block
        shown = [chance.choice(_wordings(case)[kind]) for (case, _), kind in zip(near, kinds, strict=False)]
        own = demonstration(fact(edit), fact(edit))
        return [*reversed(shown), own]  # the most similar last, and the edit as a copy of itself

    def _pool(self, lm: LM) -> tuple[list[tuple[Case, str]], torch.Tensor]:
        """What can be shown, a case with a text, and the vectors to find it by; read once for an LM."""

        def read() -> tuple[list[tuple[Case, str]], torch.Tensor]:
            cases = load_cases(BUNDLED, offset=OFFSET) if self.cases is None else _read(self.cases)
            if self.demonstration_mix is None:
                shown = [(case, text) for case in cases for texts in _wordings(case) for text in texts[:1]]
            else:
                shown = [(case, case.edit.text) for case in cases]
            return shown, embed(lm, [text.strip() for _, text in shown], self.encoder)

        return lm.cached(("ike", self.cases, self.encoder, self.demonstration_mix is None), read)


class Contexts:
    """The running memory: puts the context of the edit that is most like a question before it."""

    def __init__(self, patches: Sequence[Patch]):
        newest: dict[str, tuple[Edit, list[str], torch.Tensor]] = {}
        for patch in patches:
            for edit, shown, key in zip(
                patch.edits, patch.memory["demonstrations"], patch.state["keys"], strict=True
            ):
                newest[edit.text] = (edit, shown, key)  # a later edit of the same prompt replaces an earlier one
        self._edits = [(edit, shown) for edit, shown, _ in newest.values()]
        self._keys = torch.stack([key for _, _, key in newest.values()])
        settings = make(patches[-1].method, patches[-1].settings)
        self._encoder, self._answer_tokens = settings.encoder, settings.answer_tokens

    def prompts(self, lm: LM, texts: Sequence[str]) -> list[str]:
        """Each question behind its context."""
        chosen = [0] * len(texts)
        if len(self._edits) > 1:
            keys = Nearest(self._keys.to(lm.device))
            asked = embed(lm, texts, self._encoder)
            if asked.shape[1] != self._keys.shape[1]:
                raise PatchError(
                    f"expected facts kept as {asked.shape[1]} numbers, as {self._encoder or lm.name} gives them; got "
                    f"{self._keys.shape[1]}: make the edits again"
                )
            chosen = keys.search(asked)[1][:, 0].tolist()
        found = []
        for text, place in zip(texts, chosen, strict=True):
            edit, shown = self._edits[place]
            found.append("".join(_fitting(lm, shown, _tail(edit), text, self._answer_tokens)) + _tail(edit) + text)
        return found


def fact(edit: Edit) -> str:
    """The edit as a statement."""
    return edit.answered(edit.text, edit.target_new)


def demonstration(stated: str, asked: str) -> str:
    """A fact, and a question with what follows, as the paper writes them."""
    return f"New Fact: {stated}\nPrompt: {asked}\n\n"


def _tail(edit: Edit) -> str:
    """What stands between the demonstrations and the question."""
    return f"New Fact: {fact(edit)}\nPrompt: "


def _wordings(case: Case) -> tuple[list[str], list[str], list[str]]:
    """The demonstrations that a case can give: copies, updates, retentions.

    Raises:
        InputError: one of them it cannot give.
    """
    edit, stated = case.edit, fact(case.edit)

    def shown(kind: str) -> list[Probe]:
        found = [probe for probe in case.probes if probe.kind == kind]
        if not found:
            raise InputError(
                f"expected a rephrasing and another fact to demonstrate with; the case {edit.text!r} has no {kind} "
                "probe: add one, or leave the case out"
            )
        return found

    return (
        [demonstration(stated, stated)],
        [demonstration(stated, edit.answered(probe.prompt, edit.target_new)) for probe in shown("generalization")],
        [demonstration(stated, join_texts(probe.prompt, probe.answers[0])) for probe in shown("locality")],
    )


def _fitting(lm: LM, shown: Sequence[str], tail: str, question: str, answer_tokens: int) -> list[str]:
    """The last demonstrations, as many as leave room for the question and an answer of `answer_tokens` tokens."""
    if lm.max_tokens is None or not shown:
        return list(shown)
    encoded = lm.tokenizer([*shown, tail + question], add_special_tokens=True)["input_ids"]
    free = lm.max_tokens - answer_tokens - len(encoded[-1])
    kept: list[str] = []
    for text, ids in zip(reversed(shown), reversed(encoded[:-1]), strict=True):
        free -= len(ids)
        if free < 0:
            break
        kept.insert(0, text)
    return kept


def _read(path: str) -> list[Case]:
    """The cases that `fit` kept.

    Raises:
        InputError: there is no such file, or it is none of these.
    """
    try:
        # Not splitlines(): JSON texts may hold U+2028 and other characters that it takes for line ends.
        lines = [line for line in read_content(path).split(b"\n") if line.strip()]
        if not lines:
            raise FormatError("it is empty")
        return [parse_json(Case, line) for line in lines]
    except (OSError, FormatError, InputError) as error:
        raise InputError(
            f"expected a file of demonstrations at {path}; {explain(error)}: write one with IKE().fit"
        ) from error
