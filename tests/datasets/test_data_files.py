"""Files as other programs save them: encodings, byte order marks, line ends, separators, and what is no text."""

from __future__ import annotations

import gzip
import json
import zipfile

import pytest
from typer.testing import CliRunner

from reknow.cli import app
from reknow.datasets import load_cases, load_edits
from reknow.errors import InputError

ROWS = [("Düsseldorf lies in", "Österreich"), ("Zoë – a “poet” – was born in", "Orléans")]
TABLE = "prompt,target_new\n" + "".join(f"{prompt},{answer}\n" for prompt, answer in ROWS)
LIST = json.dumps([{"prompt": p, "target_new": a} for p, a in ROWS], ensure_ascii=False)


def saved(path, text: str, encoding: str):
    path.write_bytes(text.encode(encoding))
    return path


def facts(edits) -> list[tuple[str, str]]:
    return [(edit.prompt, edit.target_new) for edit in edits]


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-8", None),
        ("utf-8-sig", None),
        ("utf-16", None),  # what Excel calls Unicode text has a mark
        ("utf-16-le", "utf-16-le"),
        ("cp1252", "cp1252"),
        ("mac-roman", "Mac-Roman"),
        ("utf-8-sig", "cp1252"),  # the mark knows better
    ],
)
def test_an_encoding_is_what_the_file_says_or_the_user(tmp_path, name, encoding, named):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in json.loads(LIST))
    path = saved(tmp_path / name, {"a.csv": TABLE, "a.json": LIST, "a.jsonl": lines}[name], encoding)
    assert facts(load_edits(path, encoding=named)) == ROWS
    assert facts(case.edit for case in load_cases(path=path, encoding=named)) == ROWS


def test_chinese_files_of_chinese_programs(tmp_path):
    path = saved(tmp_path / "a.csv", "prompt,target_new\n上海位于,北京\n", "gb18030")
    assert facts(load_edits(path, encoding="gb18030")) == [("上海位于", "北京")]


def test_what_is_not_in_the_encoding_names_file_byte_and_option(tmp_path):
    path = saved(tmp_path / "a.csv", TABLE, "cp1252")
    with pytest.raises(InputError) as caught:
        load_edits(path)
    assert f"expected UTF-8 in {path}; got byte 0xfc at 19, line 2" in str(caught.value)
    assert "--encoding cp1252" in str(caught.value)
    with pytest.raises(InputError, match="expected ASCII in"):
        load_edits(saved(tmp_path / "b.csv", TABLE, "utf-8"), encoding="ascii")
    for nonsense in ("klingon", "hex", "a\0b"):
        with pytest.raises(InputError, match="expected an encoding such as utf-8"):
            load_edits(path, encoding=nonsense)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old mac"])
def test_line_ends_and_blank_lines(tmp_path, end):
    lines = ["", *map(json.dumps, json.loads(LIST)), "   ", ""]
    path = saved(tmp_path / "a.jsonl", end.join(lines), "utf-8")
    assert facts(load_edits(path)) == ROWS
    assert facts(load_edits(saved(tmp_path / "a.csv", TABLE.replace("\n", end), "utf-8"))) == ROWS


@pytest.mark.parametrize(
    "text",
    [
        "prompt;target_new\nA, in B, is;c\n",
        "prompt\ttarget_new\nA, in B, is\tc\n",
        "sep=;\nprompt;target_new\nA, in B, is;c\n",
        "sep=|\nprompt|target_new\nA, in B, is|c\n",
        '\ufeffsep=,\r\n"prompt","target_new"\r\n"A, in B, is","c"\r\n',
        '"prompt";"target_new"\n"A, in B, is";"c"\n',
    ],
    ids=["semicolon", "tab", "told", "told bar", "told comma", "quoted"],
)
def test_separators_of_spreadsheets(tmp_path, text):
    assert facts(load_edits(saved(tmp_path / "a.csv", text, "utf-8"))) == [("A, in B, is", "c")]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"prompt": "a", // the first\n "target_new": "b"}]', "line 1, column 18"),
        ('// my edits\n[{"prompt": "a", "target_new": "b"}]', "line 1, column 1"),
        ('[{"prompt": "a", "target_new": "b"},\n /* more */ {"prompt": "c", "target_new": "d"}]', "line 2, column 2"),
        ('{"prompt": "a", "target_new": "b"}\n# more\n{"prompt": "c", "target_new": "d"}', "line 2, column 1"),
    ],
    ids=["within", "first", "between", "lines"],
)
def test_json_has_no_comments(tmp_path, text, place):
    path = saved(tmp_path / "a.json", text, "utf-8")
    with pytest.raises(InputError) as caught:
        load_edits(path)
    assert f"{path}, {place}: " in str(caught.value) and "got a comment, which JSON does not have" in str(
        caught.value
    )


def test_what_is_no_text_is_named(tmp_path):
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(LIST.encode()))
    book = tmp_path / "a.csv"
    with zipfile.ZipFile(book, "w") as file:
        file.writestr("xl/workbook.xml", "<workbook/>")
    for path, kind in ((packed, "gzip"), (book, "ZIP, as Excel")):
        with pytest.raises(InputError, match=rf"a packed one \({kind}.*\): unpack it"):
            load_edits(path)
    for path in (tmp_path, tmp_path / "none.json", tmp_path / ("n" * 300), tmp_path / "a\0b.json"):
        with pytest.raises(InputError, match="expected a readable file at"):
            load_edits(path)


def test_brackets_without_end(tmp_path):
    for text in ("[" * 200_000, '{"prompt": "a", "target_new": "b"}\n' + '{"a":' * 200_000):
        with pytest.raises(InputError, match="nested without end"):
            load_edits(saved(tmp_path / "a.json", text, "utf-8"))


def test_the_command_line_takes_the_encoding(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a.csv", TABLE, "cp1252")
    found = CliRunner().invoke(app, ["edit", "--file", "a.csv", "--plan"])
    assert found.exit_code == 2 and "--encoding cp1252" in found.stderr
    options = ["--method", "ft-m", "--layer", "1", "--plan", "--json"]
    found = CliRunner().invoke(app, ["edit", "--file", "a.csv", "--encoding", "cp1252", *options])
    assert found.exit_code == 0, found.output
    found = CliRunner().invoke(app, ["bench", "--data", "a.csv"])
    assert found.exit_code == 2 and "expected UTF-8 in a.csv" in found.stderr
