"""Is an accepted answer what the model wrote? Four ways to compare two texts, none of which asks a model.

| match | what the model wrote has to be | "Paris, France. It" for "Paris" |
|---|---|---|
| `exact` | its first sentence letter for letter | 0 |
| `normalised` | its first sentence, as words in one spelling (SQuAD, and WILD without a judge) | 0 |
| `generated` | a text that begins with the answer, as words in one spelling | 1 |
| `contains` | a text with the answer anywhere in it, as words in one spelling | 1 |

`exact` is never more than `normalised`, but for answers of signs alone, and that never more than `generated` and
`contains`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from reknow.texts.writing import words

__all__ = ["MATCHES", "answer_words", "contains", "exact", "generated", "normalised"]

_ARTICLES = frozenset(("a", "an", "the"))
_ENDS = re.compile(r"\n|[.!?](?=\s|$)|[。！？]")
"""Where sentences end. "3.5" and "J.R.R. Tolkien" hold such an end no more than "St. Paul" should."""


def answer_words(text: str, articles: bool = False) -> list[str]:
    """The text as normalised words (see `generated`); `articles=True` keeps a, an, the."""
    return [word for word in words(text) if articles or word not in _ARTICLES]


def generated(text: str, answers: Sequence[str]) -> float:
    """1.0 if the continuation begins with an accepted answer and the word ends there, else 0.0.

    Both are normalised as in SQuAD (Rajpurkar et al. 2016): lower case, no punctuation, no articles; and
    hyphens and slashes part words. "English." and "the English-born" begin with "English", "Englishman" not.
    Signs that belong to a number or a name stay: "35" is not "3.5", "C" is not "C++"; see `writing.words`.
    """
    return _any(text, answers, lambda said, wanted: said[: len(wanted)] == wanted, str.startswith)


def contains(text: str, answers: Sequence[str]) -> float:
    """1.0 if an accepted answer stands anywhere in the text, as whole words, normalised as for `generated`."""

    def inside(said: list[str], wanted: list[str]) -> bool:
        return any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1))

    return _any(text, answers, inside, str.__contains__)


def normalised(text: str, answers: Sequence[str]) -> float:
    """1.0 if the first sentence is an accepted answer, both normalised as for `generated`."""
    return float(any(_any(_first(text, answer), [answer], list.__eq__, str.__eq__) for answer in answers))


def exact(text: str, answers: Sequence[str]) -> float:
    """1.0 if the first sentence is an accepted answer letter for letter, but for white space around it and the mark
    that ends it."""
    return float(any(_bare(_first(text, answer)) == _bare(answer) for answer in answers))


MATCHES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "normalised": normalised,
    "generated": generated,
    "contains": contains,
}
"""Name of each match → its function."""


def _any(
    text: str,
    answers: Sequence[str],
    match: Callable[[list[str], list[str]], bool],
    match_signs: Callable[[str, str], bool],
) -> float:
    return float(any(_matches(text, answer, match, match_signs) for answer in answers))


def _matches(text: str, answer: str, match: Callable, match_signs: Callable) -> bool:
    for articles in (False, True):  # an answer such as "A" is nothing but an article
        if wanted := answer_words(answer, articles):
            return match(answer_words(text, articles), wanted)
    return match_signs(text.strip(), answer.strip())


def _first(text: str, answer: str) -> str:
    """The text up to the end of its first sentence; of as many as the answer has."""
    text, inner = text.lstrip(), len(_ENDS.findall(_bare(answer)))
    ends = [match.end() for match in _ENDS.finditer(text)]
    return text[: ends[inner]] if len(ends) > inner else text


def _bare(text: str) -> str:
    return text.strip().rstrip(".!?。！？").rstrip()
