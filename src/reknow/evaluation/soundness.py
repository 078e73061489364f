"""Whether an edited model is sound: its edits are in force, the rest is as before; and by how much it changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reknow.checks.arguments import typed
from reknow.datasets.text import sample_text
from reknow.edits import Edit
from reknow.evaluation.effect import control_facts, observe
from reknow.evaluation.held_out import next_log_probs
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.exclusive import typed_exclusively
from reknow.model.scoring import kl_divergence
from reknow.model.tokens import EncodedText, Text, encode
from reknow.patching.deltas import sum_deltas
from reknow.patching.patches import Patch
from reknow.tracing.known import known_facts

_FACTS = 30
"""How many other facts are asked before and after."""
_TEXTS, _TEXT_TOKENS = 8, 128
"""The plain text over which KL is taken: the longest paragraphs of the sample, each cut."""


@dataclass(frozen=True)
class Asked:
    """An edit of an applied patch, asked again."""

    patch: str
    """Id of the patch."""
    edit: Edit
    said: bool
    """Whether every token of the new answer is the most likely one, given those before it."""
    probability: float
    """Of the whole new answer behind the prompt."""
    rank: int
    """The worst place that a token of it has."""
    replaced: str | None = None
    """Id of a later patch that gives the same prompt another answer, so that this one is not expected."""


@dataclass(frozen=True)
class Health:
    """A model with its patches, measured against the one without them."""

    edits: int
    """Of all patches, without those that later ones replace."""
    in_force: float
    """Share of these edits whose new answer is said, teacher-forced and exact."""
    others_kept: float | None
    """Share of other facts that are kept: the model knows them without the patches, and still says their answer,
    teacher-forced and exact. Of a model that knows none: those that are continued word for word as before. None where
    there are none to ask."""
    others: int
    """How many facts that is of."""
    perplexity_before: float
    perplexity: float
    """Of plain text."""
    kl: float
    """Mean over the tokens of plain text of KL(before ‖ now), in nats."""
    norms: dict[str, float]
    """‖ΔW‖ / ‖W‖, Frobenius, of each matrix that is changed; ΔW is the sum of all patches."""

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of plain text now, by that before; infinite where it is no number."""
        ratio = self.perplexity / self.perplexity_before
        return ratio if math.isfinite(ratio) else math.inf

    @property
    def largest_norm(self) -> float:
        """The largest of `norms`; 0 where no matrix is changed."""
        return max(self.norms.values(), default=0.0)


@typed_exclusively
def ask_again(lm: LM) -> list[Asked]:
    """Every edit of the applied patches, as the model answers its prompt now."""
    made = [(patch.id, edit) for patch in lm.patches for edit in patch.edits]
    if not made:
        return []
    newest = {edit.text: (patch_id, edit.target_new) for patch_id, edit in made}
    edits = [edit for _, edit in made]
    scores = lm.score(
        [edit.text for edit in edits], [edit.target_new for edit in edits], [edit.separator for edit in edits]
    )
    asked = []
    for (patch_id, edit), score in zip(made, scores, strict=True):
        later, answer = newest[edit.text]
        replaced = later if answer != edit.target_new else None
        asked.append(Asked(patch_id, edit, score.said, score.probability, score.rank, replaced))
    return asked


@typed
def measure(lm: LM, *, facts: int = _FACTS) -> Health:
    """How sound the model is with the patches that are applied.

    Reads the edits' prompts, `facts` other facts (those that the model knows without the patches, first in the words
    of the edits) and about a thousand tokens of plain text, with and without the patches.

    Raises:
        EditFailed: its logits are no numbers.
    """
    asked = [one for one in ask_again(lm) if one.replaced is None]
    edits = [one.edit for one in asked]
    with lm.unpatched():
        others = control_facts(lm, edits, facts)
        known = known_facts(lm, others)
        unknown = [] if known else others
        before = observe(lm, [], unknown)
    after = observe(lm, [], unknown)
    same = sum(old == new for old, new in zip(before.controls, after.controls, strict=True))
    kept = len(known_facts(lm, known)) if known else same
    return Health(
        edits=len(edits),
        in_force=sum(one.said for one in asked) / len(asked) if asked else 1.0,
        others_kept=kept / len(others) if others else None,
        others=len(others),
        perplexity_before=before.perplexity,
        perplexity=after.perplexity,
        kl=text_kl(lm),
        norms=relative_norms(lm, lm.patches),
    )


@typed_exclusively
@torch.no_grad()
def text_kl(lm: LM, texts: Sequence[str] | None = None, max_tokens: int = _TEXT_TOKENS) -> float:
    """Mean over the tokens of plain text of KL(p ‖ q) in nats: p the next token without the patches, q with them.

    It sees what patches do to weights and modules; those that rewrite prompts or let others answer do nothing here.
    """
    plain = sorted(sample_text(), key=len)[-_TEXTS:] if texts is None else texts
    cut = min(max_tokens, lm.max_tokens or max_tokens)
    total, count = 0.0, 0
    for text in plain:
        (row,) = encode(lm.tokenizer, [Text(text)])  # text to read is no chat
        read = [EncodedText(row.ids[:cut], 1)]
        with lm.unpatched():
            (before,) = next_log_probs(lm, read)
        (now,) = next_log_probs(lm, read)
        kl = kl_divergence(before, now)  # (tokens,)
        total, count = total + float(kl.sum()), count + len(kl)
    return total / count if count else 0.0


def relative_norms(lm: LM, patches: Sequence[Patch]) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖ of each matrix that the patches change, in Frobenius norms; ΔW is their sum, W the base's."""
    names = dict.fromkeys(name for patch in patches for name in patch.deltas)
    norms = {}
    for name in names:
        delta = sum_deltas([patch.deltas[name] for patch in patches if name in patch.deltas])
        norms[name] = delta.norm() / max(float(exact(lm.base_weight(name)).norm()), 1e-300)
    return norms
