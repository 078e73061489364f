"""Attention sinks: a first token whose state is huge and the same whatever the token is.

Many models keep such a state at the first position of a text (Sun et al. 2024, arXiv 2402.17762). Most tokenizers put
a token of their own there; where they do not, a subject of one token that begins the prompt is the sink. The key
found there is that of every text's first token, so an edit of it changes them all, and its length is no measure of
anything (Yang et al. 2024, arXiv 2406.11263). Such a subject is edited as it is behind other text.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch

from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.tokens import EncodedText, Text

_SAME_KEY = 0.8
"""Mean correlation between keys of different tokens from which on they are one key. SmolLM2 has 0.98 and more at the
first position and 0.2 behind other tokens; a model without a sink 0.5 and 0.3."""
_FIRST_TOKENS = 16
"""Different first tokens that are compared."""
_CHARACTERS = 20
"""Characters of the texts that they begin."""
NEUTRAL = "It is said that "
"""What stands before such a subject where the edit is computed without contexts."""


def avoid_sinks(
    lm: LM, edits: Sequence[Edit], contexts: Sequence[str], prompt: str | None = None
) -> list[Sequence[str]]:
    """Per edit the texts to put before its prompt: those given, but before an attention sink the second stands in for
    the first, which is "".

    Args:
        prompt: put them before this one, with {}, instead.
    """
    rows = lm.encode([Text.of(prompt or edit.prompt, str(edit.subject)) for edit in edits])
    first = [row.subject_last == 0 for row in rows]
    if not any(first) or not first_token_is_sink(lm):
        return [contexts] * len(edits)
    behind = [*(contexts[1:2] or [NEUTRAL]), *contexts[1:]]
    return [behind if sink else contexts for sink in first]


def subject_texts(
    lm: LM, edits: Sequence[Edit], contexts: Sequence[str], *, rephrased: bool = False
) -> list[list[Text]]:
    """Per edit its prompt behind each of the contexts, the first of which is "", then, if wanted, its rephrasings by
    themselves; a subject that is an attention sink is behind other text in all of them."""
    found = []
    for edit, prefixes in zip(edits, avoid_sinks(lm, edits, contexts), strict=True):
        found.append([Text.about(edit, prefix) for prefix in prefixes])
        if rephrased and (others := reworded(edit)):
            behind = avoid_sinks(lm, others, contexts)
            found[-1] += [Text.about(other, own[0]) for other, own in zip(others, behind, strict=True)]
    return found


def reworded(edit: Edit) -> list[Edit]:
    """The edit in each of its rephrasings; raises InputError where one does not hold the subject once."""
    return [replace(edit, prompt=text, rephrasings=()) for text in dict.fromkeys(edit.rephrasings)]


def warn_of_sink(edit: Edit) -> None:
    """Says that the edit is made for its subject behind other text only."""
    warnings.warn(
        f"{edit.subject!r} begins {edit.text!r}, and this model's first token has one state whatever it is: the edit "
        "is made for the subject behind other text, and the prompt by itself may be answered as before; put words "
        "before the subject if it must not",
        stacklevel=2,
    )


def first_token_is_sink(lm: LM) -> bool:
    """Whether some layer of the base model has one key for all tokens that begin a text, and only there."""
    return lm.cached(("sink",), lambda: _has_sink(lm))


def first_token_inputs(lm: LM, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """What linear modules of the base model get at the first token of any text, where that is one and the same: at an
    attention sink, and at a token that the tokenizer puts there itself.

    Returns:
        Name → (1, in), float64.
    """

    def read() -> dict[str, torch.Tensor]:
        with lm.unpatched():
            bare = _read_bare(lm, [row.ids[0] for row in _rows(lm)], names)
        return {
            name: exact(keys).mean(0, keepdim=True)
            for name, keys in bare.items()
            if _mean_correlation(keys) >= _SAME_KEY
        }

    return lm.cached(("first token", *names), read)


def _rows(lm: LM) -> list[EncodedText]:
    """Texts that begin with different tokens, where the tokenizer puts none of its own there."""
    from reknow.datasets.facts import load_facts  # loaded where it is asked, which is rare

    rows: dict[int, EncodedText] = {}
    for row in lm.encode([Text(fact.text[:_CHARACTERS]) for fact in load_facts("counterfact")]):
        rows.setdefault(row.ids[0], row)
    return list(rows.values())[:_FIRST_TOKENS]


def _read_bare(lm: LM, tokens: Sequence[int], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The inputs of the modules at each token as the only one. Name → (tokens, in)"""
    return lm.read([EncodedText((token,), 1) for token in tokens], [0] * len(tokens), inputs=list(names)).inputs


def _has_sink(lm: LM) -> bool:
    rows, names = _rows(lm), list(lm.parts.value)
    tokens, before = [row.ids[0] for row in rows], rows[0].ids
    with lm.unpatched():
        bare = _read_bare(lm, tokens, names)
        behind = lm.read(
            [EncodedText((*before, token), len(before) + 1) for token in tokens],
            [len(before)] * len(tokens),
            inputs=names,
        ).inputs
    return any(_mean_correlation(bare[name]) >= _SAME_KEY > _mean_correlation(behind[name]) for name in names)


def _mean_correlation(keys: torch.Tensor) -> float:
    """Mean correlation between two of the keys; 1 for one key alone. keys: (tokens, in)"""
    correlations = torch.corrcoef(exact(keys))
    count = len(keys)
    return float((correlations.sum() - count) / (count * (count - 1))) if count > 1 else 1.0
