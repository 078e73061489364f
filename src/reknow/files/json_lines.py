"""JSON lines that survive a kill: a row is written as one whole line, and a torn last line is taken off."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from reknow.errors import InputError
from reknow.files.atomic import append_line, atomic_write
from reknow.files.schema import FormatError, Object, Strict, parse_json

_RUN = "run"
"""Under which name a row in a file says to what run it belongs."""
_REMEDY = "delete that line, and the run makes it again"
_TORN = "the file ends in its midst"


class _AnyRow(Strict):
    """A row of which nothing but its key is known."""

    open: ClassVar[bool] = True


class Rows(dict[tuple, dict]):
    """Rows by key, in the order they came; with a path also appended to that file, each as one whole line.

    Args:
        key: fields that tell a row from the others.
        form: what a line holds.
        run: to what run the rows belong; lines of another one are passed over, and so are not in the way of its own.
        remedy: what to do where a line is no row.
    """

    def __init__(
        self,
        path: Path | None,
        key: Sequence[str],
        form: type[Strict] = _AnyRow,
        *,
        run: str | None = None,
        remedy: str = _REMEDY,
    ):
        super().__init__()
        self.path, self.names, self.form, self.run, self.remedy = path, tuple(key), form, run, remedy
        if path is not None and path.exists():
            whole = _whole_lines(path)
            if len(whole) < path.stat().st_size:
                os.truncate(path, len(whole))  # the line that a kill tore
            self._take(whole)

    @classmethod
    def reading(
        cls,
        path: Path,
        key: Sequence[str],
        form: type[Strict] = _AnyRow,
        *,
        run: str | None = None,
        remedy: str = _REMEDY,
    ) -> Rows:
        """The rows of a file that may still be written to: a torn last line is passed over and left."""
        rows = cls(None, key, form, run=run, remedy=remedy)
        if path.exists():
            rows.path = path
            rows._take(_whole_lines(path))
        return rows

    def _take(self, whole: bytes) -> None:
        foreign = 0
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                key, row = _read_row(line, self.names, self.form, self.run)
            except (FormatError, KeyError) as error:
                raise InputError(
                    f"expected one row as JSON with {', '.join(self.names)}; line {number} of {self.path} has "
                    f"something else ({error}): {self.remedy}"
                ) from error
            if row is None:
                foreign += 1
            else:
                self.setdefault(key, row)
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


def _read_row(line: bytes, names: Sequence[str], form: type[Strict], run: str | None) -> tuple[tuple, dict | None]:
    """The key of a line and its row, None where it is of another run; a FormatError or KeyError where it is none."""
    row = parse_json(Object, line, once=True)
    of = row.pop(_RUN, run)
    if of != run and run is not None:
        return (), None
    parse_json(form, line)
    key = tuple(row[name] for name in names)
    if not all(isinstance(part, str | int) for part in key):
        raise FormatError(f"{', '.join(names)}: expected texts and numbers")
    return key, row


def set_aside(
    path: Path, key: Sequence[str], form: type[Strict] = _AnyRow, *, run: str | None = None
) -> list[tuple[int, str]]:
    """Takes the lines that are no rows out of a file, into another beside it whose name ends in `.bad`.

    Returns:
        the number of each, and why it is none.
    """
    if not path.exists():
        return []
    *lines, torn = path.read_bytes().split(b"\n")
    kept, bad, why = [], [torn] if torn else [], [(len(lines) + 1, _TORN)] if torn else []
    for number, line in enumerate(lines, 1):
        try:
            _read_row(line, key, form, run)
            kept.append(line)
        except (FormatError, KeyError) as error:
            bad.append(line)
            why.append((number, str(error)))
    if bad:
        beside = path.with_name(f"{path.name}.bad")
        before = beside.read_bytes() if beside.exists() else b""
        _write_lines(beside, [before.removesuffix(b"\n"), *bad] if before else bad)
        _write_lines(path, kept)
    return sorted(why)


def _write_lines(path: Path, lines: Sequence[bytes]) -> None:
    atomic_write(path, lambda new: Path(new).write_bytes(b"".join(line + b"\n" for line in lines)))


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
