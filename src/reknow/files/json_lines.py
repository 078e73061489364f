"""JSON lines that survive a kill: a row is written as one whole line, and a torn last line is taken off."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from reknow.errors import InputError
from reknow.files.atomic import append_line
from reknow.files.schema import FormatError, Object, Strict, parse_json

_RUN = "run"
"""Under which name a row in a file says to what run it belongs."""


class _AnyRow(Strict):
    """A row of which nothing but its key is known."""

    open: ClassVar[bool] = True


class Rows(dict[tuple, dict]):
    """Rows by key, in the order they came; with a path also appended to that file, each as one whole line.

    Args:
        key: fields that tell a row from the others.
        form: what a line holds.
        run: to what run the rows belong; lines of another one are passed over, and so are not in the way of its own.
    """

    def __init__(
        self, path: Path | None, key: Sequence[str], form: type[Strict] = _AnyRow, *, run: str | None = None
    ):
        super().__init__()
        self.path, self.names, self.form, self.run = path, tuple(key), form, run
        if path is not None and path.exists():
            whole = _whole_lines(path)
            if len(whole) < path.stat().st_size:
                os.truncate(path, len(whole))  # the line that a kill tore
            self._take(whole)

    @classmethod
    def reading(cls, path: Path, key: Sequence[str], form: type[Strict] = _AnyRow, *, run: str | None = None) -> Rows:
        """The rows of a file that may still be written to: a torn last line is passed over and left."""
        rows = cls(None, key, form, run=run)
        if path.exists():
            rows.path = path
            rows._take(_whole_lines(path))
        return rows

    def _take(self, whole: bytes) -> None:
        foreign = 0
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                row = parse_json(Object, line, once=True)
                of = row.pop(_RUN, self.run)
                if of != self.run and self.run is not None:
                    foreign += 1
                    continue
                parse_json(self.form, line)
                key = tuple(row[name] for name in self.names)
                if not all(isinstance(part, str | int) for part in key):
                    raise FormatError(f"{', '.join(self.names)}: expected texts and numbers")
                self.setdefault(key, row)
            except (FormatError, KeyError) as error:
                raise InputError(
                    f"expected one row as JSON with {', '.join(self.names)}; line {number} of {self.path} has "
                    f"something else ({error}): delete that line, and the run makes it again"
                ) from error
        if foreign:
            warnings.warn(f"{self.path} has {foreign} rows of another run, which are left out", stacklevel=4)

    def add(self, row: dict) -> None:
        """Keeps the row, and writes it down before it returns; a key that is there already stays as it is."""
        key = tuple(row[name] for name in self.names)
        if key in self:
            return
        if self.path is not None:
            line = row if self.run is None else {**row, _RUN: self.run}
            append_line(self.path, json.dumps(line, ensure_ascii=False, allow_nan=False))
        self[key] = row


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
