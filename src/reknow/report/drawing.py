"""Where things lie in the page's own pictures: in the units of a view box, which macros.html draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from reknow.evaluation.results import Cell
from reknow.evaluation.stages import BEFORE
from reknow.report.columns import KEPT, NEW, PARAPHRASES, Column
from reknow.report.retention import Point
from reknow.report.verdict import Entry

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 40, 16, 30, 42
"""Room for what is written at the axes."""
_STEPS = {0.9: 0.02, 0.75: 0.05, 0.5: 0.1, 0.0: 0.2}
"""Where an axis of shares may begin, the highest that shows everything, and from one tick to the next."""
_ALIKE = 0.05
"""New answers that differ by less say nothing: then paraphrases are drawn."""
_LINE, _LETTER = 16, 8.4
"""Height of a label and width of a letter."""
_SHIFTS = [0, *(sign * step for step in range(9, 200, 9) for sign in (1, -1))]
"""How far below or above its dot a label may stand."""


class Dot(NamedTuple):
    """A method in the plane."""

    label: str
    colour: int
    compared: bool
    x: float
    y: float
    across: tuple[float, float] | None
    """The interval along x, and the one along y."""
    along: tuple[float, float] | None
    text_x: float
    text_y: float
    anchor: str
    far: bool
    """Does its label lie so far off that a line has to lead there?"""
    title: str


class Scatter(NamedTuple):
    """Two shares against each other; the upper right is best."""

    protocol: str
    across: str
    up: str
    ticks_x: list[tuple[float, str]]
    ticks_y: list[tuple[float, str]]
    dots: list[Dot]


class Line(NamedTuple):
    """A curve with its band, as SVG path data, and its points."""

    label: str
    colour: int
    path: str
    band: str
    points: list[tuple[float, float, str]]


class Chart(NamedTuple):
    """Shares against a number of edits."""

    title: str
    across: str
    ticks_x: list[tuple[float, str]]
    ticks_y: list[tuple[float, str]]
    lines: list[Line]


def _place_x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _place_y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def trade_off(entries: Sequence[Entry], protocol: str) -> Scatter | None:
    """The new answer against what was kept, or against paraphrases; None where fewer than two things were asked."""
    shown = [entry for entry in entries if entry.compared or entry.stage != BEFORE]
    pairs = [(KEPT, NEW), (PARAPHRASES, NEW), (KEPT, PARAPHRASES)]
    new = [cell.mean for entry in shown if entry.compared and (cell := entry.cell(NEW.key(protocol) or ""))]
    if len(new) > 1 and max(new) - min(new) < _ALIKE:
        pairs.insert(0, (KEPT, PARAPHRASES))
    for across, up in pairs:
        found = []
        for entry in shown:
            one, two = (entry.cell(column.key(protocol) or "") for column in (across, up))
            if one is not None and two is not None:
                found.append((entry, (one, two)))
        if any(entry.compared for entry, _ in found):
            return _scatter(protocol, across, up, found)
    return None


def _scatter(protocol: str, across: Column, up: Column, found: Sequence[tuple[Entry, tuple[Cell, Cell]]]) -> Scatter:
    starts = []
    for axis in (0, 1):
        lowest = min(c.mean if c.low is None else c.low for _, cells in found for c in [cells[axis]])
        starts.append(next(start for start in _STEPS if lowest >= start + (start > 0) * 0.02 or start == 0))

    def at(axis: int, value: float) -> float:
        share = (value - starts[axis]) / (1 - starts[axis])
        return (_place_y if axis else _place_x)(min(max(share, 0), 1))

    def span(axis: int, cell: Cell) -> tuple[float, float] | None:
        return None if cell.low is None or cell.high is None else (at(axis, cell.low), at(axis, cell.high))

    centres = [(at(0, cells[0].mean), at(1, cells[1].mean), entry.label) for entry, cells in found]
    dots = []
    for (entry, (one, two)), (x, y, label), place in zip(found, centres, _label_places(centres), strict=True):
        text_x, text_y, anchor = place
        title = f"{label}: {across.name} {100 * one.mean:.0f} %, {up.name} {100 * two.mean:.0f} %"
        far, looks = abs(text_y - y) > _LINE + 4, (entry.colour, entry.compared)
        dots.append(Dot(label, *looks, x, y, span(0, one), span(1, two), text_x, text_y, anchor, far, title))
    ticks_x, ticks_y = ([(at(a, tick), f"{100 * tick:g}") for tick in _ticks(starts[a])] for a in (0, 1))
    return Scatter(protocol, across.name, up.name, ticks_x, ticks_y, dots)


def _ticks(start: float) -> list[float]:
    return [round(start + _STEPS[start] * part, 4) for part in range(round((1 - start) / _STEPS[start]) + 1)]


def _label_places(dots: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Near each dot where no other label or dot is, the nearest such place first: x, y, text-anchor."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in dots]
    found = []
    for x, y, label in dots:
        width = _LETTER * len(label)
        places = [(side, shift) for shift in _SHIFTS for side in (1, -1)]

        def box(side: int, shift: int, x: float = x, y: float = y, width: float = width):
            left, middle = (x + 9 if side > 0 else x - 9 - width), y + shift
            return left, middle - _LINE / 2, left + width, middle + _LINE / 2

        def free(place: tuple[int, int], box=box) -> bool:
            left, top, right, bottom = box(*place)
            inside = left > LEFT and right < WIDTH and top > TOP - 8 and bottom < HEIGHT - BOTTOM
            return inside and not any(left < b[2] and right > b[0] and top < b[3] and bottom > b[1] for b in taken)

        side, shift = next((place for place in places if free(place)), places[0])
        taken.append(box(side, shift))
        found.append((x + 9 * side, y + shift + 4, "start" if side > 0 else "end"))
    return found


def curves(title: str, across: str, points_of: Mapping[tuple[str, int], Sequence[Point]]) -> Chart | None:
    """(Method, colour) → its points as lines; None where none has two of them."""
    drawn = {key: points for key, points in points_of.items() if len(points) > 1}
    if not drawn:
        return None
    most = max(point.at for points in drawn.values() for point in points)

    def place(at: float, share: float) -> str:
        return f"{_place_x(at / most):.1f},{_place_y(share):.1f}"

    lines = []
    for (label, colour), points in drawn.items():
        upper = [place(p.at, p.high) for p in points]
        lower = [place(p.at, p.low) for p in reversed(points)]
        named = [
            (_place_x(p.at / most), _place_y(p.mean), f"{label}, {p.at:.0f}: {100 * p.mean:.0f} %") for p in points
        ]
        path = "M" + " L".join(place(p.at, p.mean) for p in points)
        lines.append(Line(label, colour, path, "M" + " L".join(upper + lower) + "Z", named))
    step = _nice(most / 4)
    ticks_x = [(_place_x(step * i / most), f"{step * i:,.0f}") for i in range(int(most / step + 1e-9) + 1)]
    return Chart(title, across, ticks_x, [(_place_y(t), f"{100 * t:g}") for t in _ticks(0.0)], lines)


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, 20 …"""
    power = 10 ** math.floor(math.log10(max(step, 1)))
    return next(size * power for size in (1, 2, 5, 10) if size * power >= max(step, 1) - 1e-9)
