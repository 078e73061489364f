"""Records of JSON, JSON-lines and CSV files, which know where they stand, so that errors can say it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from reknow.edits import Edit
from reknow.errors import InputError, MissingExtra


class Record:
    """One object of a data file.

    `where` is its file and place as shown in errors; `index` its 0-based position in the file. The
    accessors return text without outer white space and raise InputError naming file, record and field.
    """

    def __init__(self, fields: Any, where: str, index: int, prefix: str = ""):
        self.fields, self.where, self.index, self.prefix = fields, where, index, prefix
        if not isinstance(fields, dict):
            self.refuse("", f"expected an object {{…}}; got {_shown(fields)}: write one object per record")

    def refuse(self, field: str, complaint: str) -> NoReturn:
        """Raise InputError: where this record stands, the field, the complaint."""
        path = (self.prefix + field).rstrip(".")
        raise InputError(f"{self.where}{f', field {path!r}' if path else ''}: {complaint}")

    def _required(self, field: str) -> Any:
        if field not in self.fields:
            have = ", ".join(map(repr, self.fields)) or "none"
            self.refuse(field, f"expected this field; got {have}: add it, or choose the data set of this form")
        return self.fields[field]

    def text(self, field: str) -> str:
        """A text that must be there and not be blank."""
        value = self._required(field)
        if not isinstance(value, str) or not value.strip():
            self.refuse(field, f"expected a non-empty text; got {_shown(value)}: fill it in")
        return value.strip()

    def texts(self, field: str) -> tuple[str, ...]:
        """The texts of a field that must be there: one, a list or nested lists; flat, blanks left out."""
        flat = []
        waiting = [self._required(field)]
        while waiting:
            value = waiting.pop(0)
            if isinstance(value, list):
                waiting[:0] = value
            elif isinstance(value, str):
                flat.append(value.strip())
            else:
                self.refuse(field, f"expected a text or a list of texts; got {_shown(value)}: put it in quotes")
        return tuple(text for text in flat if text)

    def record(self, field: str) -> Record:
        """The object in a field that must be there."""
        return Record(self._required(field), self.where, self.index, f"{self.prefix}{field}.")

    def records(self, field: str) -> list[Record]:
        """The list of objects in a field that must be there."""
        values = self._required(field)
        if not isinstance(values, list):
            self.refuse(field, f"expected a list of objects; got {_shown(values)}: put it in brackets")
        return [
            Record(value, self.where, self.index, f"{self.prefix}{field}[{place}].")
            for place, value in enumerate(values)
        ]

    def edit(self, prompt: str, **fields: Any) -> Edit:
        """`Edit(prompt, **fields)`; what it complains about gets this record's place in front."""
        try:
            return Edit(prompt, **fields)
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}…"


def read_records(source: Any, name: str) -> list[Record]:
    """The records of a JSON array, a single JSON object, or JSON lines.

    `source` is anything with `read_text` (a path, a packaged file); `name` is how errors call it.

    Raises:
        InputError: file missing or not UTF-8; JSON broken (line named); an entry is no object (record named).
    """
    text = read_text(source, name)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        # A file of JSON lines fails as a whole, right after its first object.
        if error.msg != "Extra data" or text.lstrip()[:1] != "{":
            _refuse_json(name, error.lineno, error)
        return list(_json_lines(text, name))
    entries = whole if isinstance(whole, list) else [whole]
    return [Record(entry, f"{name}, record {index}", index) for index, entry in enumerate(entries)]


def _json_lines(text: str, name: str) -> Iterator[Record]:
    index = 0
    # Not splitlines(): JSON texts may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            _refuse_json(name, number, error)
        yield Record(fields, f"{name}, line {number}", index)
        index += 1


def _refuse_json(name: str, line: int, error: json.JSONDecodeError) -> NoReturn:
    raise InputError(
        f"{name}, line {line}, column {error.colno}: expected a JSON array or one JSON object per line; "
        f"got '{error.msg}': correct the syntax there"
    ) from None


def read_table(source: Any, name: str) -> list[Record]:
    """The rows of a CSV file with a header; commas, semicolons or tabs; empty cells are left out.

    Raises:
        InputError: file missing or not UTF-8; a row longer than the header, or a quotation without end (line named).
    """
    text = read_text(source, name)
    header = text.split("\n", 1)[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    records = []
    try:
        columns = [column.strip() for column in next(rows, [])]
        for row in filter(None, rows):
            where = f"{name}, line {rows.line_num}"
            if len(row) > len(columns):
                raise InputError(f"{where}: expected {len(columns)} cells; got {len(row)}: quote texts with commas")
            fields = {column: cell for column, cell in zip(columns, row, strict=False) if cell.strip()}
            records.append(Record(fields, where, len(records)))
    except csv.Error as error:
        raise InputError(f"{name}, line {rows.line_num}: expected a CSV row; got '{error}': correct it") from error
    return records


def read_text(source: Any, name: str) -> str:
    """The text of a UTF-8 file, a byte order mark removed; InputError when that fails."""
    try:
        return source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = "no such file" if not source.exists() else f"'{error}'"
        raise InputError(
            f"expected a readable UTF-8 file at {name}; got {what}: check the path and the encoding"
        ) from None


def refuse_repeated(ids: Iterable[str | None], name: str) -> None:
    """InputError if an id (other than None) occurs twice: results are kept under it."""
    twice = [id for id, times in Counter(ids).items() if times > 1 and id is not None]
    if twice:
        raise InputError(f"expected a different id for every edit in {name}; got {twice[0]!r} twice: rename one")


def place_subject(prompt: str, subject: str) -> tuple[str, str | None]:
    """The prompt with `{}`, and the subject as the prompt spells it; `(prompt, None)` if it is absent.

    Whole words come before parts of words, exact case before any case, and of several places the last:
    a model has read most about the subject there.
    """
    word = rf"(?<!\w){re.escape(subject)}(?!\w)"
    for pattern, flags in ((word, 0), (word, re.IGNORECASE), (re.escape(subject), 0)):
        found = list(re.finditer(pattern, prompt, flags))
        if found and "{}" not in prompt:
            start, end = found[-1].span()
            return f"{prompt[:start]}{{}}{prompt[end:]}", found[-1].group()
    return prompt, None


def hub_file(address: str) -> Path:
    """Download `hub:owner/name[:file]` from the data sets of the Hugging Face Hub; return its local path.

    Raises:
        InputError: wrong address, no such data set or file, no network, or several files and none named.
        MissingExtra: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub as hub
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", "reading a data set from the hub") from None
    repository, _, file = address.removeprefix("hub:").partition(":")
    try:
        file = file or _only_file(address, hub.list_repo_files(repository, repo_type="dataset"))
        return Path(hub.hf_hub_download(repository, file, repo_type="dataset"))
    except InputError:
        raise
    except Exception as error:  # the classes of network and name errors differ from version to version
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"expected a data set on the hub at {address!r}; got '{reason}': check the name and the network, "
            "or download the file and give its path"
        ) from error


def _only_file(address: str, files: list[str]) -> str:
    usable = [file for file in files if file.endswith((".json", ".jsonl"))]
    if len(usable) != 1:
        raise InputError(
            f"expected one JSON file in {address!r}; got {', '.join(usable) or 'none'}: name it, as in "
            "hub:owner/name:file.json"
        )
    return usable[0]
