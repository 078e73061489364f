"""What is wrong with a file: every bad record by line and reason, and nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reknow import load_cases, load_edits
from reknow.cli.app import app
from reknow.datasets import DATASETS
from reknow.datasets.file_check import check_file
from reknow.datasets.own import schema
from reknow.errors import InputError

ROOT = Path(__file__).parent.parent.parent
FINE = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}
OTHER = {"prompt": "The capital of {} is", "subject": "Peru", "target_new": "Cusco"}
BAD = {
    "empty target": ({**FINE, "target_new": " "}, "field 'target_new': expected a non-empty text"),
    "no target": ({"prompt": "The capital of {} is", "subject": "France"}, "field 'target_new': expected this field"),
    "subject elsewhere": (
        {**FINE, "prompt": "The capital of Peru is"},
        "expected the subject 'France' once in the prompt",
    ),
    "unknown field": ({**FINE, "targte": "x"}, "unknown field 'targte'"),
    "true is no text": ({**FINE, "target_new": True}, "put it in quotes if it is the answer"),
    "a list is no prompt": ({**FINE, "prompt": ["a"]}, "field 'prompt': expected a non-empty text"),
    "no object": ([1], "expected an object"),
    "probe without answer field": ({**FINE, "locality": [{"prompt": "x"}]}, "field 'locality[0].ground_truth'"),
    "half a surrogate": ({**FINE, "target_new": "\ud83d"}, "expected its texts"),
    "too long": ({**FINE, "target_new": "x" * 2**21}, "expected texts of at most 1,048,576 characters"),
}

RIPPLE = {
    "edit": {"prompt": "The name of the mother of Ada is Zoë."},
    "Logical_Generalization": [{"test_queries": [{"prompt": "Who is the head of state of Peru?", "answers": []}]}],
}


def found(path, **options) -> list[tuple]:
    return [(bad.line, bad.record, bad.reason) for bad in check_file(path, **options).bad]


@pytest.fixture(params=["array", "spread array", "lines"])
def write(request, tmp_path):
    """Writes records in one of the forms of JSON; gives the file and the line of each record."""

    def written(records: list) -> tuple:
        path = tmp_path / ("file.jsonl" if request.param == "lines" else "file.json")
        if request.param == "lines":
            path.write_text("\n\n".join(map(json.dumps, records)))
            return path, [1 + 2 * i for i in range(len(records))]
        text = json.dumps(records, indent=None if request.param == "array" else 1)
        path.write_text(text)
        lines, at, decoder = [], text.index("[") + 1, json.JSONDecoder()
        for _ in records:
            while text[at] in " \n,":
                at += 1
            lines.append(text.count("\n", 0, at) + 1)
            at = decoder.raw_decode(text, at)[1]
        return path, lines

    return written


def test_every_bad_record_is_named_and_the_others_are_those_that_are_read(write):
    records = [FINE, *(record for record, _ in BAD.values()), OTHER]
    path, lines = write(records)
    checked = check_file(path)
    assert (checked.form, checked.records, checked.fine) == ("own", len(records), 2) and not checked.is_sound
    assert [bad.record for bad in checked.bad] == list(range(1, len(BAD) + 1))
    for bad, (name, (_, reason)) in zip(checked.bad, BAD.items(), strict=True):
        assert reason in bad.reason and bad.line == lines[bad.record or 0], name
        assert str(path) not in bad.reason, "the place stands beside it"
    refused: list[str] = []
    assert len(load_cases(path=path, refused=refused)) == checked.fine and len(refused) == len(checked.bad)


def test_a_file_that_is_read_is_sound(write):
    path, _ = write([FINE, OTHER])
    checked = check_file(path)
    assert checked.is_sound and (checked.fine, checked.records, checked.without_subject) == (2, 2, 0)
    assert len(load_edits(path)) == 2


def test_broken_syntax_does_not_hide_the_rest(tmp_path):
    whole, half = json.dumps(FINE), json.dumps(OTHER)[:-20]
    lines = tmp_path / "half.jsonl"
    lines.write_text(f"{whole}\n{half}\n{json.dumps({**OTHER, 'target_new': ''})}\n{half}")
    assert [(line, record) for line, record, _ in found(lines)] == [(2, 1), (3, 2), (4, 3)]
    array = tmp_path / "half.json"
    array.write_text(f"[\n{whole},\n{json.dumps({**OTHER, 'id': ['x']})},\n{half}\n")
    (_, first, _), (line, second, reason) = found(array)
    assert (first, second, line) == (1, 2, 4) and "expected a JSON array" in reason
    with pytest.raises(InputError, match="line 4"):  # a run does not go on with what a download left
        load_cases(path=array, refused=[])


TABLE = """prompt,target_new
"The capital of {France} as
a matter of fact is",Lyon
The capital of {Peru} is,"the ""Cusco\"""
"""


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_with_quotes_and_line_ends_inside(tmp_path, delimiter, mark):
    table = f"{mark}{TABLE}The capital of {{Chile}} is,\nx,y,z\n".replace(",", delimiter)
    path = tmp_path / ("file.tsv" if delimiter == "\t" else "file.csv")
    path.write_text(table, encoding="utf-8")
    assert [(line, record) for line, record, _ in found(path)] == [(5, 2), (6, 3)]
    assert [edit.edit.target_new for edit in load_cases(path=path, refused=[])] == ["Lyon", 'the "Cusco"']


def test_a_table_with_a_broken_row_or_without_a_column(tmp_path):
    path = tmp_path / "file.csv"
    rows = ['"The capital of {France}"x,Lyon', "The capital of {Peru} is,", "A {C} is,d", 'A {B} is,"open']
    path.write_text("\n".join(["sep=,", "prompt,target_new", *rows, ""]))
    assert [(line, record) for line, record, _ in found(path)] == [(3, 0), (4, 1), (6, 3)]
    path.write_text("prompt,target\nThe capital of {France} is,Lyon\n")
    assert check_file(path).form == "fastedit", "which has such fields, and misses the subject"
    path.write_text("question,target\nThe capital of {France} is,Lyon\n")
    ((line, record, reason),) = found(path)
    assert line is record is None and "got 'question', 'target'" in reason
    assert (
        "field 'prompt'" in found(path, form="own")[0][2]
        or "unknown field 'question'" in found(path, form="own")[0][2]
    )


def test_an_empty_cell_is_called_empty_and_not_missing(tmp_path):
    path = tmp_path / "file.csv"
    for rows in (["A {B} is,c", "A {C} is,", "A {D} is", " ,d"], ["A {B} is,"]):
        path.write_text("\n".join(["prompt,target_new", *rows]))
        for _, record, reason in found(path):
            column = "prompt" if rows[record][0] == " " else "target_new"
            assert reason == f"field '{column}': expected a text in this column; got an empty cell: fill it in"
        assert len(found(path)) == sum(row != "A {B} is,c" for row in rows) and check_file(path).form == "own"
    path.write_text("prompt,subject\nA B is,B\n")
    assert "expected this field; got 'prompt', 'subject'" in found(path, form="own")[0][2]
    path.write_text("prompt,target_new,subject\nA B is,c,\n")
    assert check_file(path).is_sound, "this one need not be filled in"


def test_questions_without_an_answer_are_counted_and_named(write, tmp_path):
    asked = [{"prompt": "Ben is in", "answer": ""}, {"prompt": "Ada is in", "answer": [[]]}]
    own = {**OTHER, "locality": [*asked, {"prompt": "Zoë is in", "answer": "Rome"}, {"prompt": "", "answer": ""}]}
    path, lines = write([FINE, own, {**FINE, "target_new": "", "portability": asked}])
    checked = check_file(path)
    assert [(one.line, one.record, one.question) for one in checked.unanswered] == [
        (lines[1], 1, "Ben is in"),
        (lines[1], 1, "Ada is in"),
    ], "of a record that is refused none is left out"
    flat = {"prompt": "A is", "subject": "A", "target_new": "b", "locality_prompt": ["x", "y"]}
    grouped = {
        "locality": {"Kind": [{"prompt": "P", "ground_truth": [[]]}], "one": {"prompt": "q", "ground_truth": ""}}
    }
    for record, questions in (
        ({**flat, "locality_ground_truth": ["", "z"]}, ["x"]),
        ({**flat, **grouped, "locality_ground_truth": ["z", "z"]}, ["P", "q"]),
        (RIPPLE, ["Who is the head of state of Peru?"]),
    ):
        path, _ = write([record])
        checked = check_file(path)
        assert checked.is_sound and [one.question for one in checked.unanswered] == questions
    done = CliRunner().invoke(app, ["data", "check", str(path)])
    assert done.exit_code == 0 and "Who is the head of state of Peru?" in done.stdout
    assert "without an answer: 1 questions, which are left out" in done.stdout


def test_bytes_that_are_no_text_are_named_line_by_line(tmp_path):
    path = tmp_path / "file.csv"
    path.write_bytes("prompt,target_new\nA {Zürich} is,big\nA {B} is,c\nA {Köln} is,big\n".encode("cp1252"))
    assert [line for line, _, _ in found(path)] == [2, 4] and "--encoding cp1252" in found(path)[0][2]
    assert check_file(path, encoding="cp1252").is_sound
    path.write_bytes("prompt,target_new\nA {Zürich} is,big\n".encode("utf-16"))
    assert check_file(path).is_sound


@pytest.mark.parametrize(
    "name", ["file.jsonl", *(pytest.param(f"file.{end}", marks=pytest.mark.slow) for end in ("json", "csv"))]
)
def test_a_line_of_100_mb_is_refused_quickly(tmp_path, name):
    path, started = tmp_path / name, time.process_time()
    long = "x" * 100_000_000
    if name.endswith("csv"):
        path.write_text(f"prompt,target_new\nA {{B}} is,{long}\nA {{C}} is,d\n")
    else:
        path.write_text(f"{json.dumps({**FINE, 'target_new': long})}\n{json.dumps(OTHER)}\n")
    checked = check_file(path)
    assert len(checked.bad) == 1 and checked.fine == 1
    assert time.process_time() - started < 20


@pytest.mark.parametrize("content", ["", "[]", "\n\n"])
def test_an_empty_file_is_no_file_of_edits(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_text(content)
    assert len(found(path)) == 1 and not check_file(path).is_sound


def test_what_is_asked_twice_and_what_contradicts_itself(write, tmp_path):
    again, against = {**FINE, "prompt": "The capital of France is"}, {**FINE, "target_new": "Nice"}
    path, lines = write([FINE, OTHER, again, against])
    checked = check_file(path)
    ((same,), (other,)) = checked.twice, checked.contradictions
    assert (same.line, same.record, same.first, same.answers) == (lines[2], 2, lines[0], ("Lyon",))
    assert (other.record, other.answers) == (3, ("Lyon", "Nice")) and checked.bad == () and not checked.is_sound
    benchmark = tmp_path / "counterfact.json"
    rewrite = {"prompt": "{} is", "subject": "A", "target_new": {"str": "b"}, "target_true": {"str": "c"}}
    texts = {"paraphrase_prompts": [], "neighborhood_prompts": [], "generation_prompts": []}
    cases = [{"requested_rewrite": rewrite | {"target_new": {"str": new}}, **texts} for new in "bd"]
    benchmark.write_text(json.dumps(cases))
    checked = check_file(benchmark)
    assert len(checked.contradictions) == 1 and checked.is_sound, "its cases are edited one by one"


def test_bundled_sets_are_sound(tmp_path):
    for name, source in DATASETS.items():
        if source.sample:
            path = ROOT / "src" / "reknow" / "assets" / "data" / source.sample
            checked = check_file(path, form=name)
            assert checked.is_sound and checked.records == checked.fine + checked.left_out, name


# --- the published form ----------------------------------------------------------------------------------


def test_the_schema_of_the_page_is_the_one_that_is_printed():
    assert json.loads((ROOT / "docs" / "edits.schema.json").read_text(encoding="utf-8")) == schema()
    printed = CliRunner().invoke(app, ["data", "schema"])
    assert json.loads(printed.stdout) == schema()


def test_schema_and_reader_agree(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    accepted = [
        FINE,
        {**FINE, "target_new": 1945, "id": 7, "context": "A fact.", "rephrasings": ["{}'s capital"], "separator": ""},
        {
            **FINE,
            "locality": [{"prompt": "x", "answer": ["a", "b"]}],
            "portability": {"hop": {"prompt": "y", "ground_truth": 3}},
        },
        {**FINE, "portability": {"hops": [{"prompt": "y", "target": "z"}]}, "target_true": None},
    ]
    shapes = (
        "unknown field",
        "true is no text",
        "a list is no prompt",
        "no object",
        "no target",
        "probe without answer field",
    )
    path = tmp_path / "file.json"
    for record in accepted:
        jsonschema.validate([record], schema())
        path.write_text(json.dumps([record]))
        assert check_file(path, form="own").is_sound, record
    for record in (BAD[name][0] for name in (*shapes, "probe without answer field")):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate([record], schema())
        path.write_text(json.dumps([record]))
        assert not check_file(path, form="own").is_sound, record


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_says_it_by_its_status_and_as_json(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(f"{json.dumps(FINE)}\n{json.dumps({**OTHER, 'target_new': ''})}\n")
    done = CliRunner().invoke(app, ["data", "check", str(path)])
    assert done.exit_code == 1 and "form own, 2 records, 1 fine, 1 bad" in done.stdout
    done = CliRunner().invoke(app, ["data", "check", str(path), "--json"])
    answer = json.loads(done.stdout)
    assert done.exit_code == 1 and answer["bad"][0]["line"] == 2 and answer["sound"] is False
    path.write_text(f"{json.dumps(FINE)}\n")
    assert CliRunner().invoke(app, ["data", "check", str(path), "--as", "own"]).exit_code == 0
    assert CliRunner().invoke(app, ["data", "check", str(path), "--as", "zrse"]).exit_code == 2
    assert CliRunner().invoke(app, ["data", "check", str(tmp_path / "nowhere.json")]).exit_code == 2


def test_the_command_lists_the_sets():
    rows = json.loads(CliRunner().invoke(app, ["data", "--json"]).stdout)
    assert {row["name"] for row in rows if row["kind"] == "cases"} == {*DATASETS}
    assert all(row["licence"] and row["source"] for row in rows)
    shown = CliRunner().invoke(app, ["data"]).stdout
    assert all(name in shown for name in DATASETS)


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n\x00\x00\n\xff", b"\x10\x00\xe5\n\x80\n", b"SQLite format 3\x00\n\xff\n"]
)
def test_what_is_no_text_at_all_is_refused_once(tmp_path, content):
    file = tmp_path / "edits.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match="expected UTF-8 in ") as refused:
        check_file(file)
    assert "\n" not in str(refused.value)
