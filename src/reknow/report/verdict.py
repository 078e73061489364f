"""Which method is best at what: a table of a line per method, for each way of reading an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reknow.evaluation.paired import tied
from reknow.evaluation.results import UNEDITED_BEFORE, Cell, Results
from reknow.evaluation.stages import AFTER_EDIT, IN_CONTEXT, UNEDITED
from reknow.report.columns import ABOUT, COLUMNS, KEPT, NEW, PARAPHRASES, PROTOCOL_NAMES, Column, interval, number

_LISTED = 4
"""Methods that a sentence names."""
_SIDE = 10
"""Columns in front of the tasks that a run has besides: answers and side effects."""


@dataclass(frozen=True)
class Entry:
    """A line of the table: a method of a run at a stage, or what it is held against."""

    label: str
    results: Results
    method: str
    stage: str
    compared: bool = True
    """False of the unedited model, and of one that has the fact in its prompt."""
    colour: int = 0

    def values(self, key: str) -> dict[str, float]:
        """Case → value; of a task its items."""
        task, _, protocol = key.rpartition("@")
        if protocol == "ability":
            return {str(item): value for item, value in enumerate(self._items(task))}
        for stage in self._stages(key):
            cases = self.results.case_values.get((self.method, stage), {})
            if found := {case: values[key] for case, values in cases.items() if key in values}:
                return found
        return {}

    def _items(self, task: str) -> list[float]:
        """What a model did in the items of a task, averaged over seeds."""
        rows, place = self.results.abilities.values(), (self.method, self.stage, task)
        found = [row["values"] for row in rows if (row["method"], row["stage"], row["task"]) == place]
        return [sum(own) / len(own) for own in zip(*found, strict=False)]

    def cell(self, key: str) -> Cell | None:
        found = (self.results.cells.get((self.method, stage, key)) for stage in self._stages(key))
        return next((cell for cell in found if cell is not None), None)

    def _stages(self, key: str) -> tuple[str, ...]:
        costs = self.compared and key.endswith("@edit")  # they stand where the edit is made
        return (self.stage, AFTER_EDIT) if costs else (self.stage,)


def entries_of(results: Results) -> list[Entry]:
    """The unedited model, where it was read with the fact in its prompt, and the methods at their last stage."""
    found = [Entry("unedited", results, *UNEDITED_BEFORE, compared=False)]
    if (UNEDITED, IN_CONTEXT) in results.case_values:
        found.append(Entry("fact in the prompt", results, UNEDITED, IN_CONTEXT, compared=False))
    return found + [
        Entry(method, results, method, results.last_stage, colour=number)
        for number, method in enumerate(results.manifest["settings"]["methods"])
    ]


class Shown(NamedTuple):
    """A number of the verdict, as it is printed."""

    text: str
    interval: str
    """Its bounds, or what it is where it has none."""
    mark: str
    """`best`, `tied` with the best, or nothing."""
    before: str = ""
    """Of the unedited model, where an edit moves a number that it should not."""


class Line(NamedTuple):
    """A line of the verdict."""

    entry: Entry
    cells: list[Shown | None]


class Verdict(NamedTuple):
    """The table of one protocol."""

    protocol: str
    columns: list[Column]
    lines: list[Line]

    def leaders(self) -> dict[str, list[str]]:
        """Column about answers → the methods that are best there, or tied with the best."""
        found = {}
        for place, column in enumerate(self.columns):
            marked = [line.entry.label for line in self.lines if (cell := line.cells[place]) and cell.mark]
            if column.asked and marked:
                found[column.name] = marked
        return found


def read_protocols(entries: Sequence[Entry]) -> list[str]:
    """The protocols in which anything was asked of an edited model, the one to show first in front."""
    asked = {
        protocol
        for protocol in PROTOCOL_NAMES
        for column in (NEW, PARAPHRASES, KEPT)
        if (key := column.key(protocol))
        and key.endswith(f"@{protocol}")
        and any(entry.cell(key) for entry in entries)
    }
    return [protocol for protocol in PROTOCOL_NAMES if protocol in asked]


def make_verdict(entries: Sequence[Entry], protocol: str) -> Verdict:
    """The table under one protocol; columns without any number are left out."""
    columns = [
        column
        for column in (*COLUMNS[:_SIDE], *_tasks(entries), *COLUMNS[_SIDE:])
        if (key := column.key(protocol)) and any(e.cell(key) for e in entries if e.compared)
    ]
    marks = [_marks(entries, column, protocol) for column in columns]
    return Verdict(
        protocol,
        columns,
        [
            Line(
                entry, [_shown(entry, column, protocol, mark[i]) for column, mark in zip(columns, marks, strict=True)]
            )
            for i, entry in enumerate(entries)
        ],
    )


def _tasks(entries: Sequence[Entry]) -> list[Column]:
    """A column for each task of lm-evaluation-harness that was measured."""
    keys = dict.fromkeys(key for entry in entries for *_, key in entry.results.cells if key.endswith("@ability"))
    return [Column(key.removesuffix("@ability"), key) for key in keys]


def about(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """Column → what it says, of those that are shown."""
    shown = dict.fromkeys(column.name for verdict in verdicts for column in verdict.columns)
    return {
        name: ABOUT.get(name, "share of this task's items that are right, %: lm-evaluation-harness") for name in shown
    }


def _marks(entries: Sequence[Entry], column: Column, protocol: str) -> list[str]:
    """Per entry: is it the best in this column, or tied with it? Nothing where there is nobody to be better than, or
    where other texts were read."""
    key = column.key(protocol) or ""
    cells = [entry.cell(key) if entry.compared else None for entry in entries]
    there = [i for i, cell in enumerate(cells) if cell is not None]
    marks = [""] * len(entries)
    if len(there) < 2 or (column.held_out and len({_held_out(entries[i]) for i in there}) > 1):
        return marks
    means = {i: cell.mean for i, cell in enumerate(cells) if cell is not None}
    best = (min if column.lower else max)(there, key=lambda i: means[i])
    for i in there:
        if means[i] == means[best]:
            marks[i] = "best"
        elif _shared(cells[i]) or _shared(cells[best]):  # one measurement of many edits: only what is printed alike
            same = number(cells[i], column) == number(cells[best], column)
            marks[i] = "tied" if same else ""
        else:
            marks[i] = "tied" if tied(entries[best].values(key), entries[i].values(key)) else ""
    return marks if any(not marks[i] for i in there) else [""] * len(entries)  # all are best: none is


def _held_out(entry: Entry) -> tuple[str, ...]:
    return tuple(entry.results.manifest["settings"].get("held_out") or ())


def _shared(cell: Cell | None) -> bool:
    return cell is not None and (cell.together > 1 or cell.low is None)


def _shown(entry: Entry, column: Column, protocol: str, mark: str) -> Shown | None:
    cell = entry.cell(column.key(protocol) or "")
    if cell is None:
        return None
    unedited = entry.results.cells.get((*UNEDITED_BEFORE, column.key(protocol) or ""))
    moved = not column.asked and entry.compared and unedited is not None
    return Shown(number(cell, column), interval(cell, column), mark, number(unedited, column) if moved else "")


def verdict_lines(verdict: Verdict, first: str = "method", *, intervals: bool = True) -> list[list[str]]:
    """The table as texts: ★ the best of a column, ≈ not told apart from it."""
    lines = [[first, *(f"{column.name}, %" if column.unit == "%" else column.name for column in verdict.columns)]]
    for line in verdict.lines:
        texts = []
        for cell in line.cells:
            if cell is None:
                texts.append("–")
                continue
            mark = {"best": " ★", "tied": " ≈"}.get(cell.mark, "")
            before = f"{cell.before} → " if cell.before else ""
            texts.append(f"{before}{cell.text}{mark}{f' ({cell.interval})' if cell.interval and intervals else ''}")
        lines.append([line.entry.label, *texts])
    return lines


def verdict_sentence(verdict: Verdict) -> str:
    """The answer in a sentence."""
    methods = [line.entry.label for line in verdict.lines if line.entry.compared]
    places = {column.name: place for place, column in enumerate(verdict.columns)}

    def said(label: str) -> str:
        line = next(line for line in verdict.lines if line.entry.label == label and line.entry.compared)
        asked = [c.name for c in verdict.columns if c.asked and line.cells[places[c.name]]]
        return ", ".join(f"{name} {line.cells[places[name]].text} %" for name in asked)  # type: ignore[union-attr]

    if not methods or not verdict.columns:
        return "No edited model has been read yet."
    if len(methods) == 1:
        return f"{methods[0]}: {said(methods[0])}."
    leaders = verdict.leaders()
    everywhere = [label for label in methods if all(label in marked for marked in leaders.values())]
    if len(everywhere) == len(methods):
        return f"These cases tell no difference between {_listed(methods)} in what was asked."
    if everywhere:
        if len(everywhere) > 1:
            return f"{_listed(everywhere)} are best, or level with the best, in all that was asked."
        return f"{everywhere[0]} is best, or level with the best, in all that was asked: {said(everywhere[0])}."
    each = "; ".join(f"{_listed(marked)} in {name}" for name, marked in leaders.items())
    asked = [column.name for column in verdict.columns if column.asked and column.name not in leaders]
    rest = f" No difference can be told in {_listed(asked)}." if asked else ""
    return f"None is best in all: {each}.{rest}"


def _listed(names: Sequence[str]) -> str:
    if len(names) > _LISTED + 1:
        names = [*names[:_LISTED], f"{len(names) - _LISTED} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
