"""Which words of two texts differ."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import NamedTuple

from reknow.texts.writing import piece_spans


class Run(NamedTuple):
    """A part of a text."""

    text: str
    differs: bool


def differing(one: str, other: str, *, unfinished: bool = False) -> tuple[list[Run], list[Run]]:
    """Both texts in runs of words that the other one has too, in the same order, and runs of words that it has not.

    Words are what blanks part, with their punctuation, and in scripts without spaces each character; blanks count for
    nothing. The runs of a text make up the whole of it.

    Args:
        unfinished: one of the texts may go on, so that what the other one has beyond its end is no difference.
    """
    places = piece_spans(one), piece_spans(other)
    words = [[text[slice(*span)] for span in spans] for text, spans in zip((one, other), places, strict=True)]
    steps = SequenceMatcher(None, *words, autojunk=False).get_opcodes()
    if unfinished and steps and steps[-1][0] in ("delete", "insert"):
        steps = steps[:-1]
    changed = [step for step in steps if step[0] != "equal"]
    marked = [(begin, end) for _, begin, end, _, _ in changed], [(begin, end) for _, _, _, begin, end in changed]
    return _runs(one, places[0], marked[0]), _runs(other, places[1], marked[1])


def _runs(text: str, spans: list[tuple[int, int]], marked: list[tuple[int, int]]) -> list[Run]:
    """The text cut where words begin or end to be marked; `marked` are numbers of words."""
    found, position = list[Run](), 0
    for first, behind in marked:
        if first == behind:
            continue
        begin, end = spans[first][0], spans[behind - 1][1]
        found += [Run(text[position:begin], False), Run(text[begin:end], True)]
        position = end
    return [run for run in (*found, Run(text[position:], False)) if run.text]
