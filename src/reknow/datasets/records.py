"""Records of data files, which know where they stand, so that errors can say it; and what all forms do with them."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Collection
from typing import Any, NoReturn, TypeVar

from reknow.edits import Edit, check_encodable
from reknow.errors import InputError
from reknow.texts.templates import escape_braces, split_template
from reknow.texts.writing import find_all

_log = logging.getLogger(__name__)
_Item = TypeVar("_Item")

_LONGEST = 2**20
"""Characters of a text: no model reads as many."""
_DEEPEST = 100
"""Levels of nesting that a record may have."""


class Record:
    """One object of a data file.

    `where` is its file and place as shown in errors; `index` its 0-based position in the file. The
    `table` says that it is a row of cells, whose entries are parted by ` | ` where there are several; `empty` names
    the columns without any. `unanswered` takes the questions that are left out since they have no answer. The
    accessors return text without outer white space and raise InputError naming file, record and field. A number
    counts as the text that stands in the file.
    """

    def __init__(
        self,
        fields: Any,
        where: str,
        index: int,
        prefix: str = "",
        table: bool = False,
        empty: Collection[str] = (),
        unanswered: list[str] | None = None,
    ):
        self.fields, self.where, self.index, self.prefix, self.table = fields, where, index, prefix, table
        self.empty, self.unanswered = empty, [] if unanswered is None else unanswered
        if not prefix and (problem := find_problem(fields)):
            self.refuse("", problem)
        if not isinstance(fields, dict):
            self.refuse("", f"expected an object {{…}}; got {shorten(fields)}: write one object per record")

    def refuse(self, field: str, complaint: str) -> NoReturn:
        """Raise InputError: where this record stands, the field, the complaint."""
        path = (self.prefix + field).rstrip(".")
        raise InputError(f"{self.where}{f', field {path!r}' if path else ''}: {complaint}")

    def leave_out(self, question: Any) -> None:
        """Notes a question that has no answer."""
        if question:
            self.unanswered.append(question if isinstance(question, str) else shorten(question))
            _log.info("%s: question without an answer left out: %s", self.where, self.unanswered[-1])

    def _required(self, field: str) -> Any:
        if field in self.empty:
            self.refuse(field, "expected a text in this column; got an empty cell: fill it in")
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
            self.refuse(field, f"expected a non-empty text; got {shorten(value)}: {_suggest(value)}")
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
                self.refuse(field, f"expected a text or a list of texts; got {shorten(value)}: {_suggest(value)}")
        return tuple(text for text in flat if text)

    def record(self, field: str) -> Record:
        """The object in a field that must be there."""
        return self._inner(self._required(field), field)

    def records(self, field: str) -> list[Record]:
        """The list of objects in a field that must be there."""
        values = self._required(field)
        if not isinstance(values, list):
            self.refuse(field, f"expected a list of objects; got {shorten(values)}: put it in brackets")
        return [self._inner(value, f"{field}[{place}]") for place, value in enumerate(values)]

    def _inner(self, value: Any, field: str) -> Record:
        return Record(value, self.where, self.index, f"{self.prefix}{field}.", unanswered=self.unanswered)

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


def find_problem(value: Any) -> str | None:
    """What is wrong with an entry of a file before its form is looked at: too deep, or a text that nothing takes."""
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            return f"expected at most {_DEEPEST} levels of nesting; got more: flatten it"
        texts = [one for one in level if isinstance(one, str)]
        if (longest := max(map(len, texts), default=0)) > _LONGEST:
            return f"expected texts of at most {_LONGEST:,} characters; got {longest:,}: is a line end missing?"
        try:
            check_encodable("its texts", texts)
        except InputError as error:
            return str(error)
        lists = [one for one in level if isinstance(one, list)]
        objects = [one for one in level if isinstance(one, dict)]
        level = [part for one in lists for part in one]
        level += [part for one in objects for pair in one.items() for part in pair]
        depth += 1
    return None


class Number(str):
    """A number of a JSON file, as it is written there: an answer such as 1945 or 3.50 is what a model shall say."""


def _suggest(value: Any) -> str:
    return "put it in quotes if it is the answer" if isinstance(value, (bool, dict)) else "fill it in"


def shorten(value: Any) -> str:
    if isinstance(value, Number):
        return value
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}…"


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
