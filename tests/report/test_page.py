"""The page of a run: whole, offline, escaped, and honest about what is missing."""

from __future__ import annotations

import csv
import json
import re

import pytest

from conftest import make_lm
from reknow import FT, Case, Edit, Probe
from reknow.errors import InputError
from reknow.evaluation import Plan, Results, bench
from reknow.evaluation.results import TABLES
from reknow.report import plots, write_report
from reknow.report.page import READ

METHODS = {"fine": FT(layer=2, steps=20, learning_rate=0.17), "weak <b>": FT(layer=2, steps=1)}


def make_cases() -> list[Case]:
    wordings = ("<script>alert(1)</script> {} is", "The capital of {} is", "{} lives in")
    return [
        Case(
            Edit(wording, subject="Peru", target_new="Paris .", target_true="Lima"),
            (Probe("Danielle & <i>Peru</i> is in", ("Lima",), "locality", "neighborhood"),),
        )
        for wording in wordings
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    plan = Plan("sequential", checkpoints=(1, 2))
    bench(make_lm(), make_cases(), METHODS, folder, plan=plan, dataset="made up")
    return folder


def test_the_page_needs_nothing_else_and_escapes_what_models_say(run):
    page = write_report(run).read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<i>Peru" not in page and "weak <b>" not in page
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', re.sub(r'xlink:href="#[^"]*"', "", page))
    assert page.count("<svg") == 6  # reliability, locality, and two of retention and of time
    for protocol in ("teacher_forced_exact", "teacher_forced_tokens", "generated", "contrast"):
        assert f"<code>{protocol}</code>" in page
    assert "not finished" not in page and 'id="answers"' in page and "generated freely" in page


def test_every_protocol_is_explained():
    assert set(READ) == {protocol for protocol, *_ in TABLES}


def test_csv_and_markdown_hold_the_numbers_of_the_results(run, tmp_path):
    write_report(run, tmp_path)
    cells = Results.load(run).cells
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert len(rows) == len(cells)
    for row in rows:
        cell = cells[row["method"], row["stage"], f"{row['metric']}@{row['protocol']}"]
        assert float(row["mean"]) == cell.mean
    markdown = (tmp_path / "report.md").read_text()
    cell = cells["fine", "end", "locality@generated"]
    assert f"{cell.number()} {cell.interval()}" in markdown
    for picture in re.findall(r"\]\((.*?\.png)\)", markdown):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_says_so(run, tmp_path):
    for name in ("manifest.json", "before.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    lines = (run / "cases.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cases.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    assert "0 of 6 cases have been read to the end" in write_report(tmp_path).read_text()
    (tmp_path / "cases.jsonl").unlink()
    assert "0 of 6" in write_report(tmp_path).read_text()


def test_curves_are_drawn_of_what_was_read(run, tmp_path):
    """Free answers were not asked for, and the second method was killed before its first checkpoint."""
    cases, plan = make_cases(), Plan("sequential", checkpoints=(1, 2), generate=False)
    results = bench(make_lm(), cases, METHODS, tmp_path, plan=plan)
    assert (
        plots.sequence_figure(results, "generated") is None and plots.retention_figure(results, "generated") is None
    )
    page = write_report(tmp_path).read_text()
    assert 'id="answers"' not in page and "<details" not in page and "generated freely" not in page
    results = Results.load(run)
    rows = {key: row for key, row in results.rows.items() if row["method"] == "fine" or row["stage"] == "after_edit"}
    picture = plots.sequence_figure(Results(results.manifest, results.before, rows), "generated")
    assert [line.get_label() for line in picture.axes[0].lines] == ["fine, reliability", "fine, locality"]


def test_failures_are_listed(run, tmp_path):
    for name in ("manifest.json", "before.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    rows = [json.loads(line) for line in (run / "cases.jsonl").read_text().splitlines()]
    for row in rows:
        row["error"] = "singular <system>" if row["case"] == "1" and row["method"] == "fine" else None
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    assert "Failed edits: 1" in page and "singular &lt;system&gt;" in page


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected a run folder"):
        write_report(tmp_path)
