"""Which method is best at what: a table of a line per method, for each way of reading an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reknow.evaluation.metrics import PROTOCOLS
from reknow.evaluation.paired import paired
from reknow.evaluation.results import UNEDITED_BEFORE, Cell, Results
from reknow.evaluation.stages import AFTER_EDIT, IN_CONTEXT, UNEDITED

PROTOCOL_NAMES = {
    "generated": "free generation",
    "teacher_forced_exact": "teacher-forced: exact",
    "teacher_forced_tokens": "teacher-forced: tokens",
    "judged": "judged by a model",
    "match": "answer anywhere",
    "contrast": "new against true",
    "likelihood": "likelihood of texts",
    "written": "words of long answers",
}
"""Protocol → its name on the page; the first that was read is shown first."""
_LISTED = 4
"""Methods that a sentence names."""
_FEW = 200
"""From so many cases on a share has a digit behind the point."""


class Column(NamedTuple):
    """A column of the verdict: one line here is all that a further one takes."""

    name: str
    metrics: Mapping[str, str] | str
    """Protocol → metric, with `@` where it is another protocol's; or one key whatever the protocol."""
    unit: str = "%"
    lower: bool = False
    """Is less better?"""

    @property
    def asked(self) -> bool:
        """Is it about answers, whose protocol can be chosen?"""
        return not isinstance(self.metrics, str)

    def key(self, protocol: str) -> str | None:
        """`metric@protocol` of the numbers; None: this protocol has none."""
        if isinstance(self.metrics, str):
            return self.metrics
        metric = self.metrics.get(protocol)
        return metric if metric is None or "@" in metric else f"{metric}@{protocol}"


def _of_kind(kind: str, **others: str) -> dict[str, str]:
    return {**dict.fromkeys((*PROTOCOLS, "judged"), kind), **others}


NEW = Column(
    "new answer",
    _of_kind("reliability", match="contains", contrast="ES", likelihood="sentiment", written="token_f1"),
)
REWORDED = Column(
    "rewordings",
    _of_kind("generalization", match="paraphrase_contains", contrast="PS", written="paraphrase_token_f1"),
)
KEPT = Column(
    "others kept",
    _of_kind(
        "locality", judged="locality@generated", match="locality@generated", contrast="NS", likelihood="z_topic"
    ),
)
COLUMNS = (
    NEW,
    REWORDED,
    KEPT,
    Column("consequences", _of_kind("portability")),
    Column("instructed", _of_kind("instructed")),
    Column("perplexity", "perplexity@side", unit="", lower=True),
    Column("drift", "kl@side", unit="nats", lower=True),
    Column("weights moved", "weight_change@side", unit="relative", lower=True),
    Column("fluency", "fluency@sampled", unit="bits"),
    Column("time per edit", "seconds@edit", unit="s", lower=True),
    Column("stored per edit", "stored_kb@edit", unit="kB", lower=True),
)
ABOUT = {
    "new answer": "the request's own prompt gives the new answer",
    "rewordings": "so do paraphrases of the request",
    "others kept": "other questions are answered as before the edit, whether that was right or wrong",
    "consequences": "what follows from the new fact follows",
    "instructed": "the new answer where the edit comes with an instruction",
    "perplexity": "of held-out text under the edited model: rises when an edit does general harm",
    "drift": "KL(unedited ‖ edited) per token of that text, in nats",
    "weights moved": "the largest relative change of a matrix, ‖ΔW‖ / ‖W‖",
    "fluency": "entropy of the word pairs and triples of sampled text: low where it repeats itself",
    "time per edit": "of making the patch, the model loaded",
    "stored per edit": "what the patch keeps: change of weights or memory",
}


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
        """Case → value."""
        for stage in self._stages():
            cases = self.results.case_values.get((self.method, stage), {})
            if found := {case: values[key] for case, values in cases.items() if key in values}:
                return found
        return {}

    def cell(self, key: str) -> Cell | None:
        found = (self.results.cells.get((self.method, stage, key)) for stage in self._stages())
        return next((cell for cell in found if cell is not None), None)

    def _stages(self) -> tuple[str, ...]:
        return (self.stage, AFTER_EDIT) if self.compared else (self.stage,)  # costs stand where the edit is made


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
        for column in (NEW, REWORDED, KEPT)
        if (key := column.key(protocol))
        and key.endswith(f"@{protocol}")
        and any(entry.cell(key) for entry in entries)
    }
    return [protocol for protocol in PROTOCOL_NAMES if protocol in asked]


def make_verdict(entries: Sequence[Entry], protocol: str) -> Verdict:
    """The table under one protocol; columns without any number are left out."""
    columns = [
        column
        for column in COLUMNS
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


def _marks(entries: Sequence[Entry], column: Column, protocol: str) -> list[str]:
    """Per entry: is it the best in this column, or tied with it? Nothing where there is nobody to be better than."""
    key = column.key(protocol) or ""
    cells = [entry.cell(key) if entry.compared else None for entry in entries]
    there = [i for i, cell in enumerate(cells) if cell is not None]
    marks = [""] * len(entries)
    if len(there) < 2:
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
            gap = paired(entries[best].values(key), entries[i].values(key))
            marks[i] = "tied" if gap is None or gap.tied else ""
    return marks if any(not marks[i] for i in there) else [""] * len(entries)  # all are best: none is


def _shared(cell: Cell | None) -> bool:
    return cell is not None and (cell.together > 1 or cell.low is None)


def _shown(entry: Entry, column: Column, protocol: str, mark: str) -> Shown | None:
    cell = entry.cell(column.key(protocol) or "")
    if cell is None:
        return None
    unedited = entry.results.cells.get((*UNEDITED_BEFORE, column.key(protocol) or ""))
    moved = not column.asked and entry.compared and unedited is not None
    return Shown(number(cell, column), interval(cell, column), mark, number(unedited, column) if moved else "")


def number(cell: Cell | None, column: Column) -> str:
    """The mean as people read it, with its unit but for shares."""
    return "–" if cell is None else amount(cell.mean, column.unit, cell.cases)


def interval(cell: Cell, column: Column) -> str:
    """The bounds of the mean; of a measurement that edits share, that it is one."""
    if cell.protocol == "side" and cell.together > 1:
        return ""
    if cell.together > 1:
        return f"mean of {cell.cases} made {f'{cell.together} ' if cell.together < cell.cases else ''}together"
    if cell.low is None or cell.high is None:
        return ""
    if cell.low == cell.high:  # all cases agree, so that a resampled one says nothing of how far to trust it
        alike = {0.0: f"in none of {cell.cases}", 1.0: f"in all {cell.cases}"} if column.asked else {}
        return alike.get(cell.mean, "")
    low, high = (amount(bound, column.unit, cell.cases) for bound in (cell.low, cell.high))
    if low == high:
        return ""
    *number_low, unit_low = low.split(" ")
    return f"{' '.join(number_low) if number_low and high.endswith(f' {unit_low}') else low} – {high}"


def amount(value: float, unit: str, cases: int = 1) -> str:
    """A number with its unit; shares are percent without the sign, which stands above them."""
    if unit == "%":
        return f"{100 * value:.{0 if cases < _FEW else 1}f}"
    if unit == "kB":
        for size, name in ((1e6, "GB"), (1e3, "MB"), (1, "kB")):
            if value >= size:
                return f"{value / size:.3g} {name}"
        return f"{1000 * value:.0f} B"
    if unit == "s":
        return f"{value / 60:.1f} min" if value >= 600 else f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    if unit in ("nats", "relative"):
        return f"{value:.2g}" if value >= 1e-5 else "<1e-5"
    return f"{value:.2f}"


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
        return f"These cases tell no difference between {_listed(methods)}."
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
