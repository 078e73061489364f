"""Texts to put before a prompt, so that an edit holds wherever its prompt stands (ROME, arXiv 2202.05262, §3.1)."""

from __future__ import annotations

from collections.abc import Sequence

from reknow.lm import LM
from reknow.texts.writing import full_stop

__all__ = ["sample_contexts"]


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
        with lm.unpatched(), lm.progress.stage("writing contexts", len(groups), unit="groups") as advance:
            for count, tokens in groups:
                opening = [first_words[i % len(first_words)] if first_words else "" for i in range(count)]
                continued = lm.generate(opening, tokens, top_k=5, seed=seed)
                said = [(a + b).strip() for a, b in zip(opening, continued, strict=True)]
                texts += [f"{text}{full_stop(text)} " for text in said]
                advance()
        return ("", *texts)

    return lm.cached(("contexts", tuple(tuple(group) for group in groups), tuple(first_words), seed), sample)
