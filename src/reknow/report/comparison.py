"""Several runs on one page: a line per run and method over the cases of all, and what their differences are worth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from reknow.errors import InputError
from reknow.evaluation.paired import Difference, paired
from reknow.evaluation.results import Results, row_readings
from reknow.evaluation.stages import stage_label
from reknow.files.atomic import write_text
from reknow.report import contents
from reknow.report.columns import COLUMNS, PROTOCOL_NAMES
from reknow.report.page import answer, environment, style_and_script
from reknow.report.verdict import (
    Entry,
    Verdict,
    entries_of,
    make_verdict,
    read_protocols,
    verdict_lines,
)
from reknow.texts.tables import to_markdown

FILE = "comparison"


class Gap(NamedTuple):
    """What a line has more than the first, on the same cases."""

    label: str
    differences: list[tuple[str, Difference | None]]
    """Column → the difference."""

    @property
    def cases(self) -> int:
        """How many both have."""
        return max((found.cases for _, found in self.differences if found), default=0)


class Comparison(NamedTuple):
    """Runs beside each other, over the cases that all have."""

    whole: dict[str, Results]
    common: dict[str, Results]
    """The same runs, cut to those cases."""
    entries: list[Entry]
    verdicts: list[Verdict]
    """One for each protocol that all have read."""
    gaps: dict[str, list[Gap]]
    """Protocol → the differences."""
    remarks: list[str]


def compare(runs: Mapping[str, Results]) -> Comparison:
    """What a page of several runs says.

    Raises:
        InputError: the runs have no case in common, or share no way of reading answers.
    """
    common = on_common_cases(runs)
    entries = compared_entries(common)
    protocols = shared_protocols(common, entries)
    verdicts = [make_verdict(entries, protocol) for protocol in protocols]
    gaps = {protocol: gaps_to_first(entries, protocol) for protocol in protocols}
    return Comparison(dict(runs), common, entries, verdicts, gaps, differing(runs, common))


def render_comparison(compared: Comparison) -> str:
    """The page, as HTML."""
    whole, entries = compared.whole, compared.entries
    return (
        environment()
        .get_template("comparison.html")
        .render(
            **style_and_script(),
            title=f"{len(whole)} runs on the same cases",
            runs={name: contents.describe_head(results) for name, results in whole.items()},
            cases=_count(compared.common),
            remarks=compared.remarks,
            **answer(entries, compared.verdicts),
            gaps=compared.gaps,
            first=next(entry.label for entry in entries if entry.compared),
            points=points,
            p_value=p_value,
            settings={name: results.manifest["settings"]["methods"] for name, results in whole.items()},
        )
    )


def write_comparison(runs: Mapping[str, Results], folder: str | Path) -> Path:
    """Writes `comparison.html` and `comparison.md`: the runs' methods side by side, over the cases that all have.

    Returns:
        The path of the page.

    Raises:
        InputError: see `compare`.
    """
    folder, compared = Path(folder), compare(runs)
    page = render_comparison(compared)
    write_text(folder / f"{FILE}.md", _markdown(compared))
    return write_text(folder / f"{FILE}.html", page)


def on_common_cases(runs: Mapping[str, Results]) -> dict[str, Results]:
    """The runs cut to the cases that all of them have: alike in id, request, and the new answer.

    Raises:
        InputError: there is none.
    """
    asked = {name: {_identity(row): case for (case,), row in run.before.items()} for name, run in runs.items()}
    common = set.intersection(*(set(cases) for cases in asked.values()))
    if not common:
        counts = ", ".join(f"{name} {len(cases)}" for name, cases in asked.items())
        raise InputError(
            f"expected runs that have cases in common; got none among {counts}: compare runs on the same data, with "
            "the same --offset and --shuffle; of a study of several sets one, as STUDY/SET"
        )
    found = {}
    for name, run in runs.items():
        mine = {asked[name][identity] for identity in common}
        before = {key: row for key, row in run.before.items() if row["case"] in mine}
        rows = {key: row for key, row in run.rows.items() if row["case"] in mine}
        found[name] = replace(run, before=before, rows=rows)
    return found


def _identity(row: Mapping) -> tuple:
    edit = row["edit"]
    return row["case"], edit["prompt"], edit.get("subject"), edit["target_new"]


def _questions_digest(run: Results) -> str:
    """Tells what was asked about the edits from what another run asked."""
    asked = {
        case: [(r.kind, r.name, r.prompt, r.answers) for r in row_readings(row)]
        for (case,), row in run.before.items()
    }
    return _digest(sorted(asked.items()))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


def _count(runs: Mapping[str, Results]) -> int:
    return len(next(iter(runs.values())).before)


def compared_entries(runs: Mapping[str, Results]) -> list[Entry]:
    """A line per run and method, named by both; the unedited model once for each model."""
    entries: list[Entry] = []
    models = {name: run.manifest["settings"]["model"] for name, run in runs.items()}
    named: set[tuple[str, str]] = set()
    for name, run in runs.items():
        for entry in entries_of(run):
            if entry.compared:
                colour = sum(one.compared for one in entries)
                entries.append(replace(entry, label=f"{name}: {entry.method}", colour=colour))
            elif (models[name], entry.label) not in named:
                named.add((models[name], entry.label))
                several = f", {run.manifest['model']}" if len(set(models.values())) > 1 else ""
                entries.append(replace(entry, label=entry.label + several))
    return sorted(entries, key=lambda entry: entry.compared)


def shared_protocols(runs: Mapping[str, Results], entries: Sequence[Entry]) -> list[str]:
    """The protocols that every run has read.

    Raises:
        InputError: there is none.
    """
    read = {
        name: read_protocols([entry for entry in entries if entry.compared and entry.results is run])
        for name, run in runs.items()
    }
    shared = [protocol for protocol in PROTOCOL_NAMES if all(protocol in found for found in read.values())]
    if not shared:
        each = "; ".join(f"{name}: {', '.join(found) or 'none'}" for name, found in read.items())
        raise InputError(
            f"expected runs whose answers were read by one protocol at least; got {each}: let them finish, or run "
            "them with the same --generate"
        )
    return shared


def gaps_to_first(entries: Sequence[Entry], protocol: str) -> list[Gap]:
    """What each line but the first has more than it, column by column about answers."""
    first, *others = [entry for entry in entries if entry.compared]
    columns = [(column.name, key) for column in COLUMNS if column.asked and (key := column.key(protocol))]
    columns = [(name, key) for name, key in columns if first.values(key)]
    return [
        Gap(entry.label, [(name, paired(entry.values(key), first.values(key))) for name, key in columns])
        for entry in others
    ]


def differing(whole: Mapping[str, Results], common: Mapping[str, Results]) -> list[str]:
    """Sentences about what is not alike in the runs, so that nobody takes it for the methods' doing."""
    remarks = []
    count, sizes = _count(common), {name: len(run.before) for name, run in whole.items()}
    if any(size > count for size in sizes.values()):
        each = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        remarks.append(
            f"Answers are over the {count} cases that the runs have in common: {each}. What is measured once is "
            "of the whole run."
        )
    settings = {name: run.manifest["settings"] for name, run in whole.items()}
    about = {
        "The models differ": {n: f"{whole[n].manifest['model']} ({s['model']})" for n, s in settings.items()},
        "The edits were made in different modes": {
            n: s["mode"] + (f", {s['batch_size']} at a time" if s["batch_size"] > 1 else "")
            for n, s in settings.items()
        },
        "The answers were read at different stages": {n: stage_label(run.last_stage) for n, run in common.items()},
        "Different patches were applied before": {n: ", ".join(s["patches"]) or "none" for n, s in settings.items()},
        "The held-out texts differ, so perplexity and drift cannot be compared": {
            n: f"{len(s.get('held_out') or ())} texts ({_digest(s.get('held_out'))})" for n, s in settings.items()
        },
        "The questions about the same edits differ": {n: _questions_digest(run) for n, run in common.items()},
        "The seeds differ": {n: ", ".join(map(str, s["seeds"])) for n, s in settings.items()},
        "The runs are of different versions": {n: s["reknow"] for n, s in settings.items()},
        "They were read by different protocols, of which those are shown that all share": {
            n: ", ".join(read_protocols([e for e in entries_of(run) if e.compared])) for n, run in common.items()
        },
    }
    for what, values in about.items():
        if len(set(values.values())) > 1:
            remarks.append(f"{what}: {'; '.join(f'{name}: {value}' for name, value in values.items())}.")
    remarks += [f"{name}: {rest}" for name, run in whole.items() if (rest := contents.describe_rest(run))]
    return remarks


def points(difference: Difference | None) -> str:
    """A difference of shares in points with its interval, and p."""
    if difference is None:
        return "–"
    mean, low, high = (f"{100 * value:+.1f}" for value in difference[:3])
    return f"{mean} [{low}, {high}]"


def p_value(difference: Difference) -> str:
    """p as it is printed."""
    return "p < 0.001" if difference.p < 0.001 else f"p = {difference.p:.2g}"


def _markdown(compared: Comparison) -> str:
    parts = [f"# {len(compared.whole)} runs on the same {_count(compared.common)} cases", *compared.remarks]
    for verdict in compared.verdicts:
        table = to_markdown(verdict_lines(verdict, "run: method"))
        parts.append(f"**{PROTOCOL_NAMES[verdict.protocol].capitalize()}**\n\n{table}")
        if rows := compared.gaps[verdict.protocol]:
            head = ["over the first", *(name for name, _ in rows[0].differences), "cases"]
            body = [
                [
                    gap.label,
                    *(points(d) + (f", {p_value(d)}" if d else "") for _, d in gap.differences),
                    str(gap.cases),
                ]
                for gap in rows
            ]
            parts.append(f"Differences, points:\n\n{to_markdown([head, *body])}")
    parts.append(
        "★ best; ≈ not told apart from it. Differences are taken case by case, with 95 % bootstrap intervals; p: "
        "permutation test by signs, of yes and no the exact sign test; each comparison by itself."
    )
    return "\n\n".join(parts) + "\n"
