"""Records of JSON, JSON-lines and CSV files, which know where they stand, so that errors can say it."""

from __future__ import annotations

import csv
import io
import json
import logging
import random
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from reknow.datasets.sources import download, read_text
from reknow.edits import Edit, check_encodable
from reknow.errors import InputError
from reknow.progress import progress
from reknow.texts.templates import escape_braces, split_template
from reknow.texts.writing import find_all

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")

_TABLES = (".csv", ".tsv")
_DEEPEST = 100
"""Levels of nesting that a record may have."""


class Record:
    """One object of a data file.

    `where` is its file and place as shown in errors; `index` its 0-based position in the file. The
    `table` says that it is a row of cells, whose entries are parted by ` | ` where there are several. The
    accessors return text without outer white space and raise InputError naming file, record and field. A number
    counts as the text that stands in the file.
    """

    def __init__(self, fields: Any, where: str, index: int, prefix: str = "", table: bool = False):
        self.fields, self.where, self.index, self.prefix, self.table = fields, where, index, prefix, table
        if not prefix and (problem := _find_problem(fields)):
            self.refuse("", problem)
        if not isinstance(fields, dict):
            self.refuse("", f"expected an object {{…}}; got {_shorten(fields)}: write one object per record")

    def refuse(self, field: str, complaint: str) -> NoReturn:
        """Raise InputError: where this record stands, the field, the complaint."""
        path = (self.prefix + field).rstrip(".")
        raise InputError(f"{self.where}{f', field {path!r}' if path else ''}: {complaint}")

    def _required(self, field: str) -> Any:
        if field not in self.fields:
            have = ", ".join(map(repr, self.fields)) or "none"
            self.refuse(field, f"expected this field; got {have}: add it, or choose the data set of this form")
        return self.fields[field]

    def has(self, field: str) -> bool:
        """Whether the field is there with something in it."""
        return self.fields.get(field) not in (None, "", [], {})

    def text(self, field: str) -> str:
        """A text that must be there and not be blank."""
        value = self._required(field)
        if not isinstance(value, str) or not value.strip():
            self.refuse(field, f"expected a non-empty text; got {_shorten(value)}: {_suggest(value)}")
        return value.strip()

    def texts(self, field: str) -> tuple[str, ...]:
        """The texts of a field that must be there: one, a list or nested lists; flat, blanks left out."""
        return self._flat(field, self._required(field))

    def entries(self, field: str) -> list[str]:
        """The text of each entry of a field that must be there, "" for a blank one; of a list the first."""
        values = self._required(field)
        if not isinstance(values, list):
            values = values.split(" | ") if self.table else [values]
        return [next(iter(self._flat(field, value)), "") for value in values]

    def _flat(self, field: str, value: Any) -> tuple[str, ...]:
        flat = []
        waiting = [value]
        while waiting:
            value = waiting.pop(0)
            if isinstance(value, list):
                waiting[:0] = value
            elif isinstance(value, str):
                flat += map(str.strip, value.split(" | ") if self.table else [value])
            else:
                self.refuse(field, f"expected a text or a list of texts; got {_shorten(value)}: {_suggest(value)}")
        return tuple(text for text in flat if text)

    def record(self, field: str) -> Record:
        """The object in a field that must be there."""
        return Record(self._required(field), self.where, self.index, f"{self.prefix}{field}.")

    def records(self, field: str) -> list[Record]:
        """The list of objects in a field that must be there."""
        values = self._required(field)
        if not isinstance(values, list):
            self.refuse(field, f"expected a list of objects; got {_shorten(values)}: put it in brackets")
        return [
            Record(value, self.where, self.index, f"{self.prefix}{field}[{place}].")
            for place, value in enumerate(values)
        ]

    def edit(self, prompt: str, **fields: Any) -> Edit:
        """`Edit(prompt, **fields)`; what it complains about gets this record's place in front."""
        try:
            return Edit(escape_braces(prompt), **fields)
        except InputError as error:
            raise InputError(self.placed(error)) from None

    def placed(self, error: InputError) -> str:
        """The complaint, with this record's place in front if it does not begin with it."""
        text = str(error)
        return text if text.startswith(self.where) else f"{self.where}: {text}"


def _find_problem(value: Any) -> str | None:
    """What is wrong with an entry of a file before its form is looked at: too deep, or a text that nothing takes."""
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            return f"expected at most {_DEEPEST} levels of nesting; got more: flatten it"
        try:
            check_encodable("its texts", [one for one in level if isinstance(one, str)])
        except InputError as error:
            return str(error)
        lists = [one for one in level if isinstance(one, list)]
        objects = [one for one in level if isinstance(one, dict)]
        level = [part for one in lists for part in one]
        level += [part for one in objects for pair in one.items() for part in pair]
        depth += 1
    return None


class _Number(str):
    """A number of a JSON file, as it is written there: an answer such as 1945 or 3.50 is what a model shall say."""


def _suggest(value: Any) -> str:
    return "put it in quotes if it is the answer" if isinstance(value, (bool, dict)) else "fill it in"


def _shorten(value: Any) -> str:
    if isinstance(value, _Number):
        return value
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}…"


def read_sample(name: str) -> list[Record]:
    """The records of a bundled file."""
    return read_records(files("reknow") / "assets" / "data" / name, name)


def read_file(
    path: str | Path, *, encoding: str | None = None, refused: dict[int, str] | None = None
) -> list[Record]:
    """The records of a JSON, JSON-lines or CSV file, or of one of the hub (`hub:owner/name[:file]`)."""
    file = download(str(path)) if str(path).startswith("hub:") else Path(path).expanduser()
    read = _read_table if file.suffix.lower() in _TABLES else read_records
    return read(file, str(path), encoding=encoding, refused=refused)


def read_records(
    source: Any, name: str, *, encoding: str | None = None, refused: dict[int, str] | None = None
) -> list[Record]:
    """The records of a JSON array, a single JSON object, or JSON lines; of lists of one length in a single object, a
    record of each place.

    Args:
        source: anything with `read_bytes` (a path, a packaged file).
        name: how errors call it.
        encoding: see `read_text`.
        refused: takes index → complaint of every entry or line that is no record; None: the first is raised.

    Raises:
        InputError: file missing or not in this encoding; JSON broken (line named); an entry is no object (record
            named).
    """
    text = read_text(source, name, encoding)
    try:
        whole = _parse(text)
    except json.JSONDecodeError as error:
        # A file of JSON lines fails as a whole, right after its first object or within a line that is broken.
        if not _is_json_lines(text, error):
            raise _syntax_error(text, name, error.lineno, error) from None
        return list(_json_lines(text, name, refused))
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
    return json.loads(text, parse_int=_Number, parse_float=_Number)


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
    if not isinstance(first, list) or _find_problem(whole):
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
    source: Any, name: str, *, encoding: str | None = None, refused: dict[int, str] | None = None
) -> list[Record]:
    """The rows of a CSV file with a header; commas, semicolons or tabs; empty cells are left out.

    Arguments as in `read_records`. A first line `sep=;`, as Excel writes it, names what parts the cells.

    Raises:
        InputError: file missing or not in this encoding; a row longer than the header, or a quotation without end
            (line named).
    """
    text = read_text(source, name, encoding)
    named = re.match(r"sep=(.)\n", text)
    header = text[named.end() if named else 0 :].split("\n", 1)[0]
    delimiter = named[1] if named else max(",;\t", key=header.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[Record] = []
    try:
        if named:
            next(rows)
        columns = [column.strip() for column in next(rows, [])]
        for index, row in enumerate(filter(None, rows)):
            where = f"{name}, line {rows.line_num}"
            fields: Any = {column: cell for column, cell in zip(columns, row, strict=False) if cell.strip()}
            if len(row) > len(columns):
                problem = f"{where}: expected {len(columns)} cells; got {len(row)}: quote texts with commas"
                _refuse(index, InputError(problem), refused)
            else:
                records.append(Record(fields, where, index, table=True))
    except csv.Error as error:
        raise InputError(f"{name}, line {rows.line_num}: expected a CSV row; got '{error}': correct it") from error
    return records


def select(items: list[_Item], limit: int | None, offset: int, seed: int | None) -> list[_Item]:
    """At most `limit` items behind `offset` passed over, shuffled before where a `seed` is given."""
    if offset < 0 or (limit is not None and limit < 1):
        raise InputError(f"expected limit ≥ 1 and offset ≥ 0; got limit={limit}, offset={offset}: correct them")
    if seed is not None:
        random.Random(seed).shuffle(items)
    if offset >= len(items):
        raise InputError(
            f"expected more than {offset} records; got {len(items)}: lower the offset, or check the file"
        )
    chosen = items[offset:][:limit]
    if limit is not None and len(chosen) < limit:
        _log.warning("expected %d records; there are only %d after the offset", limit, len(chosen))
    return chosen


def place_subject(prompt: str, subject: str) -> tuple[str, str | None]:
    """The prompt with `{}`, and the subject as the prompt spells it; `(prompt, None)` if it is absent.

    Whole words come before parts of words, exact case before any case, and of several places the last: a model has
    read most about the subject there. A `{}` that stands there already is the place where no other names the subject.
    """
    word = rf"(?<!\w){re.escape(subject)}(?!\w)"
    for pattern, flags in ((word, 0), (word, re.IGNORECASE), (re.escape(subject), 0)):
        matches = list(re.finditer(pattern, prompt, flags))
        if matches and "{}" not in prompt:
            start, end = matches[-1].span()
            return f"{prompt[:start]}{{}}{prompt[end:]}", matches[-1].group()
    if "{}" not in prompt and (alike := find_all(prompt, subject)):
        start, end = alike[-1]
        return f"{prompt[:start]}{{}}{prompt[end:]}", prompt[start:end]
    return prompt, subject if len(split_template(prompt)) == 2 and not find_all(prompt, subject) else None
