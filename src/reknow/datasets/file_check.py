"""What is wrong with a file of edits or cases: every bad record, not only the first."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from reknow.checks.arguments import typed
from reknow.datasets.cases import read_cases, unknown_form
from reknow.datasets.forms import DATASETS, form_of
from reknow.datasets.reading import array_entries, is_table, local_file, read_file
from reknow.datasets.sources import read_text, undecodable_lines
from reknow.edits import Case
from reknow.errors import InputError, did_you_mean
from reknow.texts.writing import normalize

__all__ = ["Again", "Checked", "Problem", "Unanswered", "check_file"]

_PLACE = re.compile(r", (?:line (?P<line>\d+)|record \d+)(?:, column (?P<column>\d+))?(?:, |: )")
"""What stands between the name of a file and a complaint."""
_ONE_PATCH = ("own", "easyedit", "fastedit")
"""Forms whose edits are meant to be made together, so that two that contradict each other are an error."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a record."""

    line: int | None
    """Of the file, from 1; of a record of several lines the last in CSV, else the first. None: the whole file."""
    record: int | None
    """Its number, from 0."""
    reason: str
    """One sentence."""


@dataclass(frozen=True)
class Again:
    """A record that asks what an earlier one asks."""

    line: int | None
    record: int
    first: int | None
    """Line of the earlier one."""
    prompt: str
    answers: tuple[str, ...]
    """The earlier answer, and this one if it is another."""


@dataclass(frozen=True)
class Unanswered:
    """A question that no model can be asked, since the file has no answer to it."""

    line: int | None
    record: int
    question: str


@dataclass(frozen=True)
class Checked:
    """What a check found."""

    file: str
    form: str | None
    """Row of `DATASETS`: the given one, or the one that the fields tell; None: none."""
    records: int
    fine: int
    bad: tuple[Problem, ...]
    """In the order of the file."""
    left_out: int
    """Records that the form leaves out on purpose, such as those of zsRE without an answer."""
    twice: tuple[Again, ...]
    """Edits that are asked for once more."""
    contradictions: tuple[Again, ...]
    """Edits that want another answer to the same question."""
    contradictions_are_bad: bool
    """Whether edits of this form are made in one patch, which refuses them."""
    without_subject: int
    """Edits that name no subject, so that ROME and its relatives refuse them."""
    unanswered: tuple[Unanswered, ...]
    """Questions that are left out."""

    @property
    def is_sound(self) -> bool:
        """Whether a command takes all of it."""
        return not self.bad and not (self.contradictions and self.contradictions_are_bad)


@typed
def check_file(path: str | Path, *, form: str | None = None, encoding: str | None = None) -> Checked:
    """Reads a file as `load_cases` and `load_edits` do, and notes what they would refuse.

    Args:
        path: JSON, JSON lines or CSV, or `hub:owner/name[:file]`.
        form: a row of `DATASETS`; None: the one that its fields tell.
        encoding: of the file; None: what its byte order mark says, else UTF-8.

    Raises:
        InputError: no such file, or form; a packed file.
        MissingExtra: a hub address without huggingface_hub.
    """
    if form is not None and form not in DATASETS:
        raise did_you_mean("form", form, DATASETS)
    name, file = str(path), local_file(path)
    try:
        text = read_text(file, name, encoding)
    except InputError:
        wrong = undecodable_lines(file, encoding) if file.is_file() else {}
        if not wrong:
            raise
        return _found(name, form, [Problem(line, None, reason) for line, reason in wrong.items()])
    complaints: dict[int, str] = {}
    records = read_file(path, encoding=encoding, refused=complaints, salvage=True)
    lines = {r.index: int(found[1]) for r in records if (found := re.search(r"line (\d+)$", r.where))}
    if not lines and not is_table(file):
        lines = dict(enumerate(line for line, _ in array_entries(text)))
    known, cases = form or form_of(records), dict[int, Case]()
    if known is not None:
        cases = read_cases(known, DATASETS[known], records, complaints, name)
    bad = [_problem(index, complaints[index], name, lines) for index in sorted(complaints)]
    if known is None and records:
        bad.append(Problem(None, None, unknown_form(records, name)))
    elif not records and not bad:
        bad.append(Problem(None, None, "expected at least one record; got none: add one with prompt and target_new"))
    count = len({*complaints, *(record.index for record in records)})
    silent = [
        Unanswered(lines.get(record.index), record.index, question)
        for record in records
        if record.index in cases
        for question in record.unanswered
    ]
    return _found(name, known, bad, count, cases, lines, silent)


def _found(
    name: str,
    form: str | None,
    bad: Iterable[Problem],
    records: int = 0,
    cases: dict[int, Case] | None = None,
    lines: dict[int, int] | None = None,
    unanswered: Iterable[Unanswered] = (),
) -> Checked:
    cases, lines, first = cases or {}, lines or {}, dict[str, int]()
    twice, contradictions = [], []
    for index, case in cases.items():
        earlier = first.setdefault(normalize(case.edit.text), index)
        if earlier == index:
            continue
        answers = cases[earlier].edit.target_new, case.edit.target_new
        differ = normalize(answers[0]) != normalize(answers[1])
        again = Again(lines.get(index), index, lines.get(earlier), case.edit.text, answers[: 1 + differ])
        (contradictions if differ else twice).append(again)
    bad = tuple(bad)
    return Checked(
        file=name,
        form=form,
        records=records,
        fine=len(cases),
        bad=bad,
        left_out=max(0, records - len(cases) - len(bad)) if form else 0,
        twice=tuple(twice),
        contradictions=tuple(contradictions),
        contradictions_are_bad=form in _ONE_PATCH,
        without_subject=sum(edit.subject is None for case in cases.values() for edit in case.edits),
        unanswered=tuple(unanswered),
    )


def _problem(index: int, complaint: str, name: str, lines: dict[int, int]) -> Problem:
    """The complaint without the place in front of it."""
    rest = complaint.removeprefix(name)
    if (place := _PLACE.match(rest)) is None:
        return Problem(lines.get(index), index, complaint)
    line = int(place["line"]) if place["line"] else lines.get(index)
    column = f"column {place['column']}: " if place["column"] else ""
    return Problem(line, index, column + rest[place.end() :])
