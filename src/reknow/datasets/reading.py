"""JSON, JSON-lines and CSV files as records."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from reknow.datasets.records import Number, Record, find_problem
from reknow.datasets.sources import download, read_text
from reknow.errors import InputError
from reknow.progress import progress

_TABLES = (".csv", ".tsv")


def read_sample(name: str) -> list[Record]:
    """The records of a bundled file."""
    return read_records(files("reknow") / "assets" / "data" / name, name)


def read_file(
    path: str | Path,
    *,
    encoding: str | None = None,
    refused: dict[int, str] | None = None,
    salvage: bool = False,
) -> list[Record]:
    """The records of a JSON, JSON-lines or CSV file, or of one of the hub (`hub:owner/name[:file]`).

    Args:
        salvage: with `refused`, broken syntax that may cost any number of records is noted too, and what can be read
            in spite of it is given: for who wants to know what is wrong, not for a run.

    Other arguments and errors as in `read_records`.
    """
    file = local_file(path)
    read = _read_table if is_table(file) else read_records
    return read(file, str(path), encoding=encoding, refused=refused, salvage=salvage)


def local_file(path: str | Path) -> Path:
    """The file; one of the hub is downloaded."""
    return download(str(path)) if str(path).startswith("hub:") else Path(path).expanduser()


def is_table(file: Path) -> bool:
    """Whether its rows are cells."""
    return file.suffix.lower() in _TABLES


def read_records(
    source: Any,
    name: str,
    *,
    encoding: str | None = None,
    refused: dict[int, str] | None = None,
    salvage: bool = False,
) -> list[Record]:
    """The records of a JSON array, a single JSON object, or JSON lines; of lists of one length in a single object, a
    record of each place.

    Args:
        source: anything with `read_bytes` (a path, a packaged file).
        name: how errors call it.
        encoding: see `read_text`.
        refused: takes index → complaint of every entry or line that is no record; None: the first is raised.
        salvage: see `read_file`.

    Raises:
        InputError: file missing or not in this encoding; JSON broken (line named); an entry is no object (record
            named).
    """
    text = read_text(source, name, encoding)
    try:
        whole = _parse(text)
    except json.JSONDecodeError as error:
        # A file of JSON lines fails as a whole, right after its first object or within a line that is broken.
        if _is_json_lines(text, error):
            return list(_json_lines(text, name, refused))
        whole = [entry for _, entry in array_entries(text)]
        _refuse(len(whole), _syntax_error(text, name, error.lineno, error), refused if salvage else None)
    except RecursionError:
        raise InputError(
            f"expected a JSON array of records in {name}; got brackets nested without end: correct it"
        ) from None
    entries = whole if isinstance(whole, list) else _split_lists(whole, name)
    records = []
    for index, entry in progress.each(f"reading {name}", [*enumerate(entries)], unit="records"):
        if (record := _make_record(entry, f"{name}, record {index}", index, refused)) is not None:
            records.append(record)
    return records


def _parse(text: str) -> Any:
    return json.loads(text, parse_int=Number, parse_float=Number)


def array_entries(text: str) -> Iterator[tuple[int, Any]]:
    """(line, entry) of each entry of a JSON array, up to the end or to what is broken; none of another text."""
    decoder = json.JSONDecoder(parse_int=Number, parse_float=Number)
    place, line, counted = re.match(r"\s*\[\s*", text), 1, 0
    while place is not None:
        try:
            entry, end = decoder.raw_decode(text, start := place.end())
        except (json.JSONDecodeError, RecursionError):
            return
        line, counted = line + text.count("\n", counted, start), start
        yield line, entry
        place = re.compile(r"\s*,\s*").match(text, end)


def _make_record(fields: Any, where: str, index: int, refused: dict[int, str] | None) -> Record | None:
    try:
        return Record(fields, where, index)
    except InputError as error:
        _refuse(index, error, refused)


def _refuse(index: int, problem: InputError, refused: dict[int, str] | None) -> None:
    """Notes the problem, or raises it where nobody takes notes."""
    if refused is None:
        raise problem from None
    refused[index] = str(problem)


def _is_json_lines(text: str, error: json.JSONDecodeError) -> bool:
    """Whether a text that is not one JSON value is one in each line: it goes on behind a first object, or its first
    line is broken and its second is not."""
    if text.lstrip()[:1] != "{":
        return False
    lines = [line for line in text.split("\n") if line.strip()]
    return error.msg == "Extra data" or any(_is_object(line) for line in lines[:2])


def _is_object(line: str) -> bool:
    try:
        return isinstance(_parse(line), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


def _json_lines(text: str, name: str, refused: dict[int, str] | None) -> Iterator[Record]:
    # Not splitlines(): JSON texts may hold U+2028 and other characters that it takes for line ends.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for index, (number, line) in enumerate(progress.each(f"reading {name}", lines, unit="records")):
        try:
            fields = _parse(line)
        except (json.JSONDecodeError, RecursionError) as error:
            _refuse(index, _syntax_error(line, name, number, error), refused)
            continue
        if (record := _make_record(fields, f"{name}, line {number}", index, refused)) is not None:
            yield record


def _syntax_error(text: str, name: str, line: int, error: json.JSONDecodeError | RecursionError) -> InputError:
    column = getattr(error, "colno", 1)
    at = text.split("\n")[getattr(error, "lineno", 1) - 1] if text else ""
    what = f"got '{getattr(error, 'msg', 'brackets nested without end')}': correct the syntax there"
    if re.match(r"\s*(//|/\*|#)", at[column - 1 :]):
        what = "got a comment, which JSON does not have: take it out"
    return InputError(
        f"{name}, line {line}, column {column}: expected a JSON array or one JSON object per line; {what}"
    )


def _split_lists(whole: Any, name: str) -> list[Any]:
    """The records of one object: itself, or one for each place of the lists that `prompt` and `target_new` are."""
    first = whole.get("prompts", whole.get("prompt")) if isinstance(whole, dict) else None
    if not isinstance(first, list) or find_problem(whole):
        return [whole]

    def at(place: int, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: at(place, inner, f"{path}.{key}") for key, inner in value.items()}
        if not isinstance(value, list):
            return value
        if len(value) != len(first):
            raise InputError(
                f"{name}, field {path!r}: expected {len(first)} entries, one per prompt; got {len(value)}: correct it"
            )
        return value[place]

    return [{key: at(place, value, key) for key, value in whole.items()} for place in range(len(first))]


def _read_table(
    source: Any,
    name: str,
    *,
    encoding: str | None = None,
    refused: dict[int, str] | None = None,
    salvage: bool = False,
) -> list[Record]:
    """The rows of a CSV file with a header; commas, semicolons or tabs; empty cells are left out.

    Arguments as in `read_file`. A first line `sep=;`, as Excel writes it, names what parts the cells.

    Raises:
        InputError: file missing or not in this encoding; a row longer than the header, or a quotation without end
            (line named).
    """
    text = read_text(source, name, encoding)
    named = re.match(r"sep=(.)\n", text)
    body = text[named.end() if named else 0 :]
    delimiter = named[1] if named else max(",;\t", key=body.split("\n", 1)[0].count)
    rows = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, strict=True)
    records: list[Record] = []
    columns: list[str] | None = None
    for index, row in enumerate(_rows(rows), -1):
        where = f"{name}, line {rows.line_num + bool(named)}"
        if isinstance(row, csv.Error):
            problem = InputError(f"{where}: expected a CSV row; got '{row}': correct it")
            _refuse(max(index, 0), problem, refused if salvage else None)
        elif columns is None:
            columns = [column.strip() for column in row]
        elif len(row) > len(columns):
            problem = f"{where}: expected {len(columns)} cells; got {len(row)}: quote texts with commas"
            _refuse(index, InputError(problem), refused)
        else:
            fields: Any = {column: cell for column, cell in zip(columns, row, strict=False) if cell.strip()}
            empty = [column for column in columns if column not in fields]
            records.append(Record(fields, where, index, table=True, empty=empty))
    return records


def _rows(rows: Any) -> Iterator[list[str] | csv.Error]:
    """The rows that are not empty; of one that is none what is wrong with it, the reader takes the next line then."""
    while True:
        try:
            if row := next(rows):
                yield row
        except csv.Error as error:
            yield error
        except StopIteration:
            return
