"""Texts to put before a prompt, so that an edit holds wherever its prompt stands (ROME, arXiv 2202.05262, §3.1)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Literal

from reknow.datasets.text import TextSource, text_source
from reknow.lm import LM
from reknow.texts.writing import full_stop

__all__ = ["general_contexts", "sample_contexts", "text_contexts"]

_PARAGRAPH = 200
"""Characters of a text that is more than a heading."""
_TEXTS_READ = 10_000
"""Texts from which beginnings are drawn: a stream may be endless."""
_LONGEST_TOKEN = 32
"""Characters that a token has at most; no more of a text is read."""


def text_contexts(lm: LM, groups: Sequence[tuple[int, int]], source: TextSource, *, seed: int = 0) -> tuple[str, ...]:
    """Texts to put before a prompt: "" and how texts of `source` begin, each closed by ". ".

    Args:
        groups: (how many, of how many tokens at most) of each kind.
        seed: of the draw of texts.
    """

    def cut() -> tuple[str, ...]:
        texts = [text for one in islice(source.texts(), _TEXTS_READ) if (text := one.strip())]
        texts = [text for text in texts if len(text) >= _PARAGRAPH] or texts
        random.Random(seed).shuffle(texts)
        tokens = [count for number, count in groups for _ in range(number)]
        return ("", *(_beginning(lm, text, count) for text, count in zip(cycle(texts), tokens, strict=False)))

    return lm.cached(("contexts of text", tuple(tuple(group) for group in groups), source.digest, seed), cut)


def _beginning(lm: LM, text: str, tokens: int) -> str:
    """So many tokens of the text, closed."""
    text = text[: _LONGEST_TOKEN * tokens]
    spans = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    begun = (text[: spans[:tokens][-1][1]] if spans else text).rstrip(" .,;")
    return f"{begun}{full_stop(begun)} "


def sample_contexts(
    lm: LM, groups: Sequence[tuple[int, int]], *, first_words: Sequence[str] = (), seed: int = 0
) -> tuple[str, ...]:
    """Texts to put before a prompt: "" and what the unedited model says of itself, each closed by ". ".

    Args:
        groups: (how many, of how many tokens at most) of each kind; ROME: (10, 5), (10, 10).
        first_words: with which the texts begin in turn; none: the token that begins texts, or ends them.
    """

    def sample() -> tuple[str, ...]:
        texts: list[str] = []
        with lm.unpatched():
            for count, tokens in lm.progress.each("writing contexts", groups, unit="groups"):
                opening = [first_words[i % len(first_words)] if first_words else "" for i in range(count)]
                continued = lm.generate(opening, tokens, top_k=5, seed=seed)
                said = [(a + b).strip() for a, b in zip(opening, continued, strict=True)]
                texts += [f"{text}{full_stop(text)} " for text in said]
        return ("", *texts)

    return lm.cached(("contexts", tuple(tuple(group) for group in groups), tuple(first_words), seed), sample)


def general_contexts(
    lm: LM, groups: Sequence[tuple[int, int]], source: Literal["text", "model"], *, seed: int = 0
) -> tuple[str, ...]:
    """`text_contexts` of the bundled text, or `sample_contexts`."""
    if source == "text":
        return text_contexts(lm, groups, text_source(None), seed=seed)
    return sample_contexts(lm, groups, seed=seed)
