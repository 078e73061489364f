"""What a method that learns to edit is trained on: an edit, texts in its scope and out of it, and the losses on them.

L_edit = mean of −log P′(answer) in scope,   L_loc = mean of KL(P ‖ P′) out of scope       P′: the edited model
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from reknow.edits import Case, Edit
from reknow.errors import InputError
from reknow.lm import LM
from reknow.model.scored_tokens import ScoredTokens, predictions
from reknow.model.scoring import kl_divergence
from reknow.model.tokens import Text, split_by_length
from reknow.progress import progress

LocalityTokens = Literal["all", "answer"]
Averaging = Literal["tokens", "texts"]
EditTexts = Literal["both", "prompt", "paraphrase"]
_Edited = Callable[[Tensor], AbstractContextManager]
"""Opens the edit with which rows of text are read; the tensor says of which example each row is. (rows,)"""


@dataclass(frozen=True)
class Example:
    """Texts made of one case; each has an answer."""

    edit: Text
    in_scope: tuple[Text, ...]
    """Must be answered as the edit asks: its own prompt, a paraphrase where the case has one, or both."""
    out_of_scope: tuple[Text, ...]
    """Must be continued as before: other facts."""

    @property
    def texts(self) -> tuple[Text, ...]:
        return (self.edit, *self.in_scope, *self.out_of_scope)


def without_instructions(cases: Sequence[Case]) -> list[Case]:
    """The cases for methods that read no instructions."""
    return [replace(case, edit=replace(case.edit, instruction=None)) for case in cases]


def make_examples(
    batch: Sequence[Case],
    rng: random.Random,
    *,
    edits_at_once: int = 1,
    locality_facts: int = 1,
    edit_texts: EditTexts = "both",
) -> list[Example]:
    """An example of each case. One paraphrase and `locality_facts` facts are drawn.

    Args:
        edits_at_once: cases whose edits are made together; the fact of a case among others must stay too.
        edit_texts: which texts must be answered as the edit asks; without paraphrases always its prompt.

    Raises:
        InputError: nothing in the batch must stay.
    """
    examples = []
    for i, case in enumerate(batch):
        edit, own = case.edit, Text.asked(case.edit, case.edit.instructed(case.edit.text))
        in_scope = [own] if edit_texts != "paraphrase" else []
        paraphrases = _paraphrases(case) if edit_texts != "prompt" else []
        in_scope += [rng.choice(paraphrases)] if paraphrases else []
        facts = [Text.of_probe(probe) for probe in case.probes if probe.kind == "locality"]
        out_of_scope = rng.sample(facts, min(len(facts), locality_facts))
        j = (i + edits_at_once) % len(batch)
        other = batch[j].edit
        if i // edits_at_once != j // edits_at_once and other.text != edit.text:
            out_of_scope.append(_before(other))
        examples.append(Example(own, tuple(in_scope or [own]), tuple(out_of_scope)))
    if not any(example.out_of_scope for example in examples):
        about = batch[0].edit.id or repr(batch[0].edit.text)
        raise InputError(
            f"expected cases with locality probes, to learn what must stay; {about} and those beside it have none: "
            "choose a data set that has them"
        )
    return examples


def possible_texts(case: Case) -> list[Text]:
    """All texts that examples may take from a case, but for what has an instruction in front."""
    facts = [Text.of_probe(probe) for probe in case.probes if probe.kind == "locality"]
    return [Text.asked(case.edit), _before(case.edit), *_paraphrases(case), *facts]


def _before(edit: Edit) -> Text:
    """An edit's prompt with the answer from before."""
    return Text(edit.text, edit.target_true or edit.target_new, separator=edit.separator)


def _paraphrases(case: Case) -> list[Text]:
    """The texts of a case that ask in other words what its edit asks."""
    edit = case.edit
    texts = [Text.asked(edit, edit.fill(template)) for template in edit.rephrasings]
    texts += [Text.of_probe(probe, edit.target_new) for probe in case.probes if probe.kind == "generalization"]
    texts += [Text.of_probe(probe) for probe in case.probes if (probe.kind, probe.name) == ("sentiment", "wanted")]
    if edit.instruction is not None:  # whoever asks later gives none
        texts.append(Text.asked(edit))
    return texts


@dataclass(frozen=True)
class Losses:
    """How an edited model reads some examples."""

    edit: Tensor
    """L_edit, label-smoothed if asked. Scalar, in nats."""
    locality: Tensor
    """L_loc. Scalar, in nats."""
    success: float
    """Share of the texts in scope whose every token is the most likely one."""
    kept: float
    """Share of the texts out of scope whose answer's most likely tokens are the ones from before."""

    def named(self) -> dict[str, float]:
        """The losses by the papers' names, and the shares."""
        losses = {"L_edit": self.edit.item(), "L_loc": self.locality.item()}
        return {**losses, "success": self.success, "locality": self.kept}


class _TextBatch:
    """Texts of examples, in batches of rows of like length.

    Args:
        texts: (number of the example, text).
        layer: as in `ScoredTokens`.
        answers_only: score the answers' tokens, not the prompts'.

    Attributes:
        of_row: (n,) row of each scored place.
        targets: (n,) token predicted there.
        in_answer: (n,) whether it belongs to the answer.
    """

    def __init__(self, lm: LM, texts: Sequence[tuple[int, Text]], layer: int | None, *, answers_only: bool):
        rows = lm.encode([text for _, text in texts])
        self.rows, self._batches = len(rows), []
        in_answer = []
        for batch in split_by_length([len(row.ids) for row in rows]):
            here = [rows[i] for i in batch]
            pairs = [predictions(row, row.prompt_length if answers_only else 1) for row in here]
            numbers = torch.tensor([texts[i][0] for i in batch], device=lm.device)
            self._batches.append((numbers, ScoredTokens(lm, here, pairs, layer, keep=True)))
            in_answer += [at + 1 >= row.prompt_length for row, of in zip(here, pairs, strict=True) for at, _ in of]
        starts = accumulate((len(numbers) for numbers, _ in self._batches), initial=0)
        scored = [scored for _, scored in self._batches]
        self.of_row = torch.cat([start + one.of_row for start, one in zip(starts, scored, strict=False)])
        self.targets = torch.cat([one.targets for one in scored])
        self.in_answer = torch.tensor(in_answer, device=lm.device)

    def log_probs(self, edited: _Edited = lambda numbers: nullcontext()) -> Tensor:
        """Log-probabilities of all tokens at the scored places. (n, vocabulary)"""
        log_probs = []
        for numbers, scored in self._batches:
            with edited(numbers):
                log_probs.append(scored.log_probs())
        return torch.cat(log_probs)

    def log_probs_before(self) -> Tensor:
        """The same of the model as it is when the texts are first read, where a layer was given."""
        return torch.cat([scored.log_probs_at_first() for _, scored in self._batches])

    def mean(self, values: Tensor, over: Averaging) -> Tensor:
        """The mean of a value for each scored place, over all of them or over the texts' means. Scalar."""
        if over == "tokens":
            return values.mean()
        counts = torch.bincount(self.of_row, minlength=self.rows)
        return (values / counts[self.of_row]).sum() / self.rows

    def share(self, flags: Tensor) -> float:
        """Share of the rows in which the flag is set at every scored place."""
        missed = torch.zeros(self.rows, device=flags.device).index_add_(0, self.of_row, (~flags).float())
        return float((missed == 0).float().mean())


class ExampleBatch:
    """The texts of some examples, to be read before and after an edit.

    Args:
        layer: the lowest that an edit changes. What is read twice runs the blocks below only once.
        locality_tokens: whether all tokens of the texts out of scope must stay, or those of their answers.
        average_over: what counts alike in the losses, tokens or texts.
    """

    def __init__(
        self,
        lm: LM,
        examples: Sequence[Example],
        layer: int,
        *,
        locality_tokens: LocalityTokens,
        average_over: Averaging,
    ):
        self._over: Averaging = average_over
        in_scope = [(i, text) for i, example in enumerate(examples) for text in example.in_scope]
        out_of_scope = [(i, text) for i, example in enumerate(examples) for text in example.out_of_scope]
        self._in_scope = _TextBatch(lm, in_scope, None, answers_only=True)
        self._out_of_scope = _TextBatch(lm, out_of_scope, layer, answers_only=locality_tokens == "answer")
        self._before = self._out_of_scope.log_probs_before()

    def losses(self, edited: _Edited, smoothing: float = 0.0) -> Losses:
        """How the edited model reads them, differentiably.

        Args:
            smoothing: of the answers' labels.
        """
        texts, others = self._in_scope, self._out_of_scope
        log_probs = texts.log_probs(edited)
        nll = -log_probs.gather(1, texts.targets[:, None])[:, 0]
        if smoothing:
            other = smoothing / (log_probs.shape[1] - 1)
            nll = (1 - smoothing - other) * nll - other * log_probs.sum(1)
        after = others.log_probs(edited)
        drift = kl_divergence(self._before, after)
        same = (after.argmax(1) == self._before.argmax(1)) | ~others.in_answer
        return Losses(
            texts.mean(nll, self._over),
            others.mean(drift, self._over),
            texts.share(log_probs.argmax(1) == texts.targets),
            others.share(same),
        )


def mean_over_batches(
    measure: Callable[[Sequence[Case], random.Random], Mapping[str, float]], cases: Sequence[Case], size: int
) -> dict[str, float]:
    """The mean of what `measure` gives, over all cases in batches of `size`, which are always the same."""
    sums: dict[str, float] = {}
    for start in progress.each("reading cases", range(0, len(cases), size), unit="batches"):
        batch = cases[start : start + size]
        for name, value in measure(batch, random.Random(start)).items():
            sums[name] = sums.get(name, 0.0) + value * len(batch) / len(cases)
    return sums
