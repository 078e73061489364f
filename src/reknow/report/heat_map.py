"""A causal trace as a picture of a page: tokens by layers, a panel for each kind of restoration, one scale for all.

Where things lie is computed here, in the units of a view box; `heat_map` of macros.html draws them.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from reknow.report.trace_words import NAMES, Label, answer_matters, label_tokens, percent, sentence_of, shown
from reknow.tracing.causal import Trace
from reknow.tracing.restoration import RestorationKind

WIDTH = 420
"""Of a panel."""
_ROW, _TOP, _BOTTOM = 20, 6, 38
"""Height of a row, and room above the cells and for what is written below them."""
_LETTER, _GAP = 8.2, 10
"""Width of a letter of a label, and room between label and cells."""
_WIDEST = 190
"""Units that labels may take of a panel."""


class Cell(NamedTuple):
    """A restored state."""

    token: int
    layer: int
    x: float
    y: float
    share: float | None
    """Where it lies on the scale, 0 to 1; None: not traced."""
    title: str


class Panel(NamedTuple):
    """What restoring one kind of state shows."""

    kind: RestorationKind
    title: str
    cells: list[Cell]
    layers: int
    ticks: list[tuple[float, int]]
    """x and layer."""


class HeatMap(NamedTuple):
    """A trace, as the macro draws it."""

    sentence: str
    answer: str
    panels: list[Panel]
    labels: list[tuple[float, Label]]
    """y and label of each row."""
    left: float
    """Where cells begin; labels end before it."""
    width: float
    height: float
    bottom: float
    """Where cells end."""
    cell: tuple[float, float]
    """Width and height of a cell."""
    scale: tuple[tuple[str, str], ...]
    """What the ends of the scale are: probability and name; below and above them colours stay the same."""


def scale_of(trace: Trace) -> tuple[float, float, tuple[str, str]]:
    """The probabilities between which colours change, and what they are: from the corrupted run's to the clean run's.
    Where there is hardly anything between those, from 0 to the largest: what differs little looks alike."""
    if answer_matters(trace):
        return trace.corrupted, trace.clean, ("subject corrupted", "as it is")
    largest = max(float(table.nan_to_num(0).max()) for table in trace.restored.values())
    return 0.0, max(trace.clean, trace.corrupted, largest, 1e-6), ("", "")


def draw_trace(trace: Trace, kinds: Sequence[RestorationKind] | None = None) -> HeatMap:
    """A trace for the macro `heat_map`; `kinds` None: all that were restored."""
    kinds = list(trace.restored) if kinds is None else list(kinds)
    labels, layers = label_tokens(trace), trace.restored[kinds[0]].shape[1]
    left = round(min(_WIDEST, max(_width(label.text) for label in labels)) + _GAP, 1)
    cell = (round((WIDTH - left) / layers, 3), _ROW)
    rows = [_TOP + _ROW * number for number in range(len(labels))]
    low, high, ends = scale_of(trace)
    panels = [_panel(trace, kind, left, cell[0], rows, low, high) for kind in kinds]
    bottom = _TOP + _ROW * len(labels)
    return HeatMap(
        sentence_of(trace),
        shown(trace.answer),
        panels,
        [(y + _ROW / 2 + 4.5, label) for y, label in zip(rows, labels, strict=True)],
        left,
        WIDTH,
        bottom + _BOTTOM,
        bottom,
        cell,
        ((percent(low), ends[0]), (percent((low + high) / 2), ""), (percent(high), ends[1])),
    )


def _panel(
    trace: Trace, kind: RestorationKind, left: float, width: float, rows: Sequence[float], low: float, high: float
) -> Panel:
    cells = []
    for token, values in enumerate(trace.restored[kind].tolist()):
        for layer, value in enumerate(values):
            traced = not math.isnan(value)
            share = round(min(1.0, max(0.0, (value - low) / (high - low))), 3) if traced else None
            title = f"“{shown(trace.tokens[token])}”, layer {layer}: {percent(value) if traced else 'not traced'}"
            cells.append(Cell(token, layer, round(left + width * layer, 2), rows[token], share, title))
    layers = trace.restored[kind].shape[1]
    ticks = [(round(left + width * (layer + 0.5), 2), layer) for layer in range(0, layers, stride(layers))]
    return Panel(kind, title_of(kind, trace.window), cells, layers, ticks)


def title_of(kind: RestorationKind, window: int) -> str:
    """What is restored, for a title or a legend."""
    name = NAMES[kind] if kind == "mlp" else NAMES[kind].capitalize().replace("mlp", "MLP")
    return f"{name}, {window} layers together" if kind in ("mlp", "attention") and window > 1 else name


def stride(layers: int) -> int:
    """How many layers lie between two labels."""
    return next(step for step in (1, 2, 5, 10, 20, 50) if layers <= 12 * step)


def _width(text: str) -> float:
    """About how wide a label is."""
    return sum(
        0 if unicodedata.combining(c) else 2 * _LETTER if unicodedata.east_asian_width(c) in "WF" else _LETTER
        for c in text
    )
