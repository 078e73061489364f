"""The page of a run: whole, offline, escaped, and honest about what is missing."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import html
import json
import math
import re
from pathlib import Path

import pytest

import reknow.report
from conftest import make_lm
from reknow import FT, GRACE, Case, Edit, Probe
from reknow.errors import InputError
from reknow.evaluation import Plan, Results, bench
from reknow.evaluation.results import TABLES
from reknow.report import plots, write_report
from reknow.report.columns import ABOUT, COLUMNS
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


def cases_inside(page: str) -> tuple[dict, list[str]]:
    """The index of the cases in a page, and the HTML of each."""

    def unpacked(name: str):
        text = re.search(rf'<script type="application/gzip" id="{name}">([^<]*)</script>', page)
        return None if text is None else json.loads(gzip.decompress(base64.b64decode(text[1])))

    chunks = [unpacked(f"chunk-{number}") for number in range(page.count('id="chunk-'))]
    return unpacked("index"), [one for chunk in chunks for one in chunk]


def test_the_page_needs_nothing_else_and_escapes_what_models_say(run):
    page = write_report(run).read_text()
    script = (Path(reknow.report.__file__).parent / "page.js").read_text()
    assert page.count("<script>") == 1 and f"<script>{script}</script>" in page
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'" in html.unescape(page)
    index, cards = cases_inside(page)
    for text in (page.replace(script, ""), *cards):
        assert "<script>alert" not in text and "<i>Peru" not in text and "weak <b>" not in text
        assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', text)
    assert sum("&lt;script&gt;alert(1)&lt;/script&gt;" in card for card in cards) == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page, "the example of those who have no script"
    assert index["methods"] == list(METHODS) and [row["id"] for row in index["rows"]] == ["0", "1", "2"]
    assert page.count("<svg") == 5 * 4  # of each protocol the trade-off, the edits by age, all so far, what was kept
    for protocol in ("teacher_forced_exact", "teacher_forced_tokens", "generated", "match", "contrast"):
        assert f"<code>{protocol}</code>" in page and f'value="{protocol}"' in page
    assert "not finished" not in page and 'id="all"' in page and "free generation" in page


def test_a_case_has_all_its_questions_with_marks_and_probabilities(run):
    results = Results.load(run)
    index, cards = cases_inside(write_report(run).read_text())
    for row, card, (case,) in zip(index["rows"], cards, results.before, strict=True):
        for question in results.before[case,]["readings"]:
            assert html.escape(question["prompt"], quote=False) in card
        for number, method in enumerate(METHODS):
            after = results.rows[method, 0, "sequential", "end", case]
            request, neighbour = after["readings"]
            (new, of_new, *_, kept, of_kept) = row["scores"]["generated"][number]
            values = results.case_values[method, "end"][case]
            assert (new, of_new, kept, of_kept) == (
                values["reliability@generated"],
                1,
                values["locality@generated"],
                1,
            )
            for answer, nll in (("Paris .", request["nll_new"]), ("Lima", neighbour["nll_true"])):
                assert f"{answer} {100 * math.exp(-nll):.1f} %" in card


def test_every_column_of_the_verdict_is_explained():
    assert set(ABOUT) == {column.name for column in COLUMNS}


def test_what_a_patch_stores_is_counted(run):
    lm = make_lm()
    patch = METHODS["fine"].edit(lm, [make_cases()[0].edit])
    size = sum(delta.dense().numel() * 4 for delta in patch.deltas.values())
    assert patch.stored_bytes == size, "FT changes whole matrices, in float32"
    rows = Results.load(run).rows.values()
    assert {row["stored_kb"] for row in rows if row["stage"] == "after_edit"} == {round(size / 1000, 3)}
    memory = GRACE(layer=2, steps=1).edit(lm, [make_cases()[1].edit])
    tensors = sum(tensor.numel() * tensor.element_size() for tensor in memory.state.values())
    assert memory.stored_bytes == tensors + len(json.dumps(memory.memory)) > tensors > 0


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
    assert "**Free generation**" in markdown and "| unedited | 0 (in none of 3) |" in markdown
    latex = (tmp_path / "report.tex").read_text()
    assert "3 cases, free generation. $\\star$ best" in latex
    assert latex.count(r"\begin{tabular}") == len(Results.load(run).tables()) + 1 and "weak \\textless{}b" in latex
    for picture in re.findall(r"\]\((.*?\.png)\)", markdown):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_pictures_say_what_they_show_and_those_of_an_earlier_report_go(run, tmp_path):
    (tmp_path / "report.md").write_text("![Reliability, %](figure1.png)\n\n![x](figure_old.png)\n")
    for name in ("figure1.png", "figure2.png", "figure_old.png"):
        (tmp_path / name).write_text("old")
    write_report(run, tmp_path)
    protocols = ("teacher_forced_exact", "generated")
    drawn = {f"{what}_{protocol}" for what in ("by_age", "so_far") for protocol in protocols}
    wanted = {f"figure_{name}.png" for name in (*drawn, "reliability", "locality")}
    assert {path.name for path in tmp_path.glob("*.png")} == wanted | {"figure2.png"}, "which no report of ours shows"
    markdown = (tmp_path / "report.md").read_text()
    assert all(f"]({name})" in markdown for name in wanted) and "figure1.png" not in markdown


def test_an_unfinished_run_says_so(run, tmp_path):
    for name in ("manifest.json", "before.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    lines = (run / "cases.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cases.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    missing = len(lines) - 2
    assert f"Not finished: {missing} of " in write_report(tmp_path).read_text()
    (tmp_path / "cases.jsonl").unlink()
    assert f"Not finished: {len(lines)} of " in write_report(tmp_path).read_text()


def test_curves_are_drawn_of_what_was_read(run, tmp_path):
    """Free answers were not asked for, and the second method was killed before its first checkpoint."""
    cases, plan = make_cases(), Plan("sequential", checkpoints=(1, 2), generate=False)
    results = bench(make_lm(), cases, METHODS, tmp_path, plan=plan)
    assert (
        plots.sequence_figure(results, "generated") is None and plots.retention_figure(results, "generated") is None
    )
    page = write_report(tmp_path).read_text()
    assert 'id="p-generated"' not in page and "free generation" not in page
    assert "teacher-forced: exact" in page, "and is shown first"
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
