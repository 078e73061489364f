"""What is left of the edits of a sequence: by how many came later, and of all so far at each checkpoint."""

from __future__ import annotations

from typing import NamedTuple

from reknow.evaluation.intervals import average_cases
from reknow.evaluation.results import Results
from reknow.evaluation.stages import END, checkpoint_edits


class Point(NamedTuple):
    """A number of a curve with its 95 % interval."""

    at: float
    """How many edits: made later, or made so far."""
    mean: float
    low: float
    high: float


def by_age(results: Results, method: str, key: str) -> list[Point]:
    """The metric against how many edits were made later: for none, and for up to eight groups of like size."""
    order = {case: number for number, (case,) in enumerate(results.before, 1)}
    found = []
    for (name, stage), cases in results.case_values.items():
        made = len(order) if stage == END else checkpoint_edits(stage) or 0
        if name == method:
            found += [(max(0, made - order[case]), values[key]) for case, values in cases.items() if key in values]
    found.sort()
    none = [pair for pair in found if pair[0] == 0]
    later = found[len(none) :]
    count = max(1, min(8, len(later) // 10))
    groups = [none, *(later[len(later) * i // count : len(later) * (i + 1) // count] for i in range(count))]
    points = []
    for group in filter(None, groups):
        mean, low, high, _ = average_cases([{key: value} for _, value in group])[key]
        at = sum(lag for lag, _ in group) / len(group)
        points.append(Point(at, mean, mean if low is None else low, mean if high is None else high))
    return points


def so_far(results: Results, method: str, key: str) -> list[Point]:
    """The metric over all edits made so far, at the checkpoints and at the end."""
    stages = {stage for _, stage, _ in results.cells}
    made = {stage: edits for stage in stages if (edits := checkpoint_edits(stage)) is not None}
    made |= {END: len(results.before)} if END in stages else {}
    points = []
    for stage, at in made.items():
        cell = results.cells.get((method, stage, key))
        if cell is not None:
            bounds = (cell.mean if bound is None else bound for bound in (cell.low, cell.high))
            points.append(Point(at, cell.mean, *bounds))
    return sorted(points)
