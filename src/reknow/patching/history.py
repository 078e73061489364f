"""Who changed a stack, when and why: an append-only file of lines, each with its own hash and the one before's.

A change is made when `stack.json` is replaced, in one step, and `stack.json` then holds the line of that change;
after that the line is appended to `history.jsonl`. A process that dies between the two leaves a line that is in
`stack.json` alone: who reads takes it from there, and the next who writes appends it first. So at any moment the list
of patches and its history agree, and no change is there twice.

The hashes show that a line was changed, taken out or put in. They are no signature: who may write to all files can
write a whole history anew, so that to prove more, the last hash has to be kept elsewhere.
"""

from __future__ import annotations

import getpass
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from reknow import __version__
from reknow.errors import InputError, PatchError
from reknow.files.atomic import append_line
from reknow.files.schema import FormatError, Listed, Strict, parse_json, read_content
from reknow.files.strict_json import strict_json
from reknow.patching.record import PatchRecord

HISTORY_FILE = "history.jsonl"
AUTHOR = "REKNOW_BY"
"""The setting that says who makes changes; without it the name under which one is logged in."""
_SHORT = 12
"""Digits of a hash by which a line is named, as those of a patch."""
_FEWEST = 4
"""Digits that a shortened name needs."""
_SEALED = ', "hash": "'

_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Applied(Strict):
    """A patch that a change put on."""

    open: ClassVar[bool] = True

    id: str
    what: str
    """Its method and what it changes, for people."""
    sha256: _Hash
    """Of its file as it lies in the stack's folder."""


class Entry(Strict):
    """One change of a stack, as a line of its history has it."""

    open: ClassVar[bool] = True

    number: Annotated[int, Field(ge=1)]
    at: datetime = Field(strict=False)
    by: str
    action: Annotated[str, Field(min_length=1, max_length=40)]
    """apply, revert, rebuild; save where a program wrote the stack and said nothing else."""
    why: str
    to: str | None = None
    """The line to whose state a revert went back."""
    applied: Listed[Applied]
    reverted: Listed[str]
    patches: Listed[str]
    """Ids of the stack after the change, the newest last."""
    found: list[str] | None = None
    """Ids before the change, where they are not those that the line before says."""
    base: str
    version: str
    """Release of the library that wrote the line."""
    previous: _Hash | None
    """Hash of the line before; None for the first."""
    hash: _Hash
    """Of this line, without this field."""


@dataclass(frozen=True)
class Line:
    """A line of a history, and what is wrong with it."""

    number: int
    """Its place in the file, from 1."""
    text: str
    entry: Entry | None
    """None where it cannot be read."""
    problem: str | None = None

    @property
    def id(self) -> str:
        """By which people name it."""
        return self.entry.hash[:_SHORT] if self.entry else "?"


def make_line(
    line_before: Line | None,
    base: str,
    before: Sequence[str],
    after: Sequence[PatchRecord],
    digests: dict[str, str],
    *,
    action: str,
    why: str,
    to: str | None,
    forgotten: Sequence[str] = (),
) -> str:
    """The line of a change from the ids `before` to the patches `after`; `digests` are of the files of new ones, and
    `forgotten` was not applied, but is to be called reverted."""
    entry_before = line_before.entry if line_before else None
    ids = [patch.id for patch in after]
    body: dict[str, Any] = {
        "number": entry_before.number + 1 if entry_before else 1,
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "by": author(),
        "action": action,
        "why": why,
        **({} if to is None else {"to": to}),
        "applied": [
            {"id": patch.id, "what": _what(patch), "sha256": digests[patch.id]}
            for patch in after
            if patch.id not in before
        ],
        "reverted": [patch_id for patch_id in (*before, *forgotten) if patch_id not in ids],
        "patches": ids,
        **({"found": list(before)} if list(before) != (entry_before.patches if entry_before else []) else {}),
        "base": base,
        "version": __version__,
        "previous": entry_before.hash if entry_before else None,
    }
    text = strict_json(body, ensure_ascii=False)
    return f'{text[:-1]}{_SEALED}{_digest(text)}"}}'


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _what(patch: PatchRecord) -> str:
    first = f": {patch.edits[0].text} → {patch.edits[0].target_new}" if patch.edits else ""
    return f"{patch.method}{first}" + (f" and {len(patch.edits) - 1} more" if len(patch.edits) > 1 else "")


def author() -> str:
    """Who makes changes: `AUTHOR`, or the name under which one is logged in."""
    try:
        name = os.environ.get(AUTHOR) or getpass.getuser()
        return name.encode(errors="replace").decode()
    except (OSError, KeyError, ImportError):  # a user without a name, as in some containers
        return f"user {os.getuid()}" if hasattr(os, "getuid") else "unknown"


# --- reading -------------------------------------------------------------------------------------------------


def read_lines(folder: Path) -> list[Line]:
    """The lines of a stack's history file, each checked by itself and against the one before; a line that a kill tore
    is passed over, and where there is no file there are none.

    Raises:
        PatchError: the file cannot be read.
    """
    lines: list[Line] = []
    for text in _whole_lines(folder / HISTORY_FILE).decode(errors="replace").split("\n")[:-1]:
        lines.append(_check_follows(lines[-1] if lines else None, _read_line(len(lines) + 1, text)))
    return lines


def _whole_lines(file: Path) -> bytes:
    try:
        content = read_content(file) if os.path.lexists(file) else b""
    except (OSError, FormatError) as error:
        raise PatchError(f"expected a history in {file}; it cannot be read ({error}): restore it") from error
    return content[: content.rfind(b"\n") + 1]


def _read_line(number: int, text: str) -> Line:
    try:
        entry = parse_json(Entry, text, once=True)
    except FormatError as error:
        return Line(number, text, None, f"it is no line of a history ({error})")
    body = text[: text.rfind(_SEALED)] + "}"
    if _digest(body) != entry.hash or text != f'{body[:-1]}{_SEALED}{entry.hash}"}}':
        return Line(number, text, entry, "its text is not the one of which it holds the hash: it was changed")
    return Line(number, text, entry)


def _check_follows(before: Line | None, line: Line) -> Line:
    """The line, with what is wrong with its place behind the line before."""
    if line.entry is None or line.problem:
        return line
    came = before.entry if before else None
    wanted = came.hash if came else None
    problem = None
    if line.entry.number != line.number:
        problem = f"it says that it is number {line.entry.number}: lines were taken out, put in or moved"
    elif line.entry.previous != wanted and (before is None or came is not None):
        problem = f"it was not written behind line {line.number - 1} as that is now: one of the two was changed"
    elif before is None or came is not None:
        was = line.entry.found if line.entry.found is not None else came.patches if came else []
        new = [patch.id for patch in line.entry.applied]
        if sorted(line.entry.patches) != sorted([*(i for i in was if i not in line.entry.reverted), *new]):
            problem = "its patches are not those of the line before with what it says was put on and taken off"
    return replace(line, problem=problem)


def reordered(before: Line | None, line: Line) -> bool:
    """Whether a change also put patches that it left on into another order; False where a line cannot be read."""
    if line.entry is None or (before is not None and before.entry is None):
        return False
    was = line.entry.found
    if was is None:
        was = before.entry.patches if before and before.entry else []
    return in_another_order(was, line.entry.patches)


def in_another_order(was: Sequence[str], now: Sequence[str]) -> bool:
    """Whether the ids that are in both stand in another order."""
    stayed = [patch_id for patch_id in now if patch_id in was]
    return stayed != [patch_id for patch_id in was if patch_id in stayed]


def with_last(lines: Sequence[Line], last: str | None, patches: Sequence[str], where: Path) -> list[Line]:
    """The history with the line that `stack.json` holds, which the file may lack; the last line names what does not
    agree with `stack.json`.

    Args:
        last: that line; None where it holds none.
        patches: ids of the patches that it names.
    """
    lines = list(lines)
    if last is not None and (not lines or lines[-1].text != last):
        line = _read_line(len(lines) + 1, last)
        if line.entry is not None and line.entry.number <= len(lines):
            old = lines[line.entry.number - 1]
            text = f"{where} names another line than this one as number {old.number} and the last of its history"
            return [*lines[: old.number - 1], replace(old, problem=old.problem or text), *lines[old.number :]]
        lines.append(_check_follows(lines[-1] if lines else None, line))
    elif last is None and lines:
        lines[-1] = replace(lines[-1], problem=lines[-1].problem or f"{where} does not name it as the last one")
    if lines and (entry := lines[-1].entry) and entry.patches != list(patches):
        text = f"its patches are not those that {where} names: that was changed since, and not by reknow"
        lines[-1] = replace(lines[-1], problem=lines[-1].problem or text)
    return lines


# --- writing -------------------------------------------------------------------------------------------------


def complete(folder: Path, last: str | None) -> Line | None:
    """The last line of a stack's history, appended if a process died before it did that; the stack is locked.

    Args:
        last: the line that `stack.json` holds.

    Raises:
        PatchError: the file ends with another line.
        InputError: it cannot be written.
    """
    file = folder / HISTORY_FILE
    lines = read_lines(folder)
    if file.exists() and (whole := len(_whole_lines(file))) < file.stat().st_size:
        _cut(file, whole)
    end = lines[-1] if lines else None
    if last is None or (end is not None and end.text == last):
        if end is not None and end.entry is None:
            raise PatchError(f"expected a history in {file}; line {end.number}: {end.problem}: restore the file")
        return end
    line = _read_line(len(lines) + 1, last)
    if line.entry is None or _check_follows(end, line).problem or (end is not None and end.entry is None):
        raise PatchError(
            f"expected {file} to end with the line that stack.json holds ({line.id}), or with the one before; it "
            f"ends with {end.id if end else 'none'}: restore it, `reknow verify {folder}` says more; or delete it "
            "and the field `last` in stack.json, and a new history begins"
        )
    append_line(file, last)
    return line


def _cut(file: Path, size: int) -> None:
    """Takes off the line that a kill tore."""
    try:
        os.truncate(file, size)
    except OSError as error:
        raise InputError(f"expected to write to {file}; got {error.strerror}: make it writable") from error


# --- finding -------------------------------------------------------------------------------------------------


def find_line(lines: Sequence[Line], wanted: str) -> Line:
    """The line after which a stack was as wanted: that of this id, the one that applied the patch of this id last, or
    the last one at this time.

    Args:
        wanted: the first digits of the id of a line or a patch, or a time in ISO 8601; without a zone it is local.

    Raises:
        InputError: there is none, or several lines begin like this.
    """
    readable = [line for line in lines if line.entry is not None]
    short = wanted.lower()
    by_id = [line for line in readable if line.entry and line.entry.hash.startswith(short)]
    by_patch = [
        line
        for line in readable
        for patch in (line.entry.applied if line.entry else ())
        if patch.id.startswith(short)
    ]
    found = by_id or by_patch[-1:]
    if len(short) >= _FEWEST and len(found) == 1:
        return found[0]
    if len(short) >= _FEWEST and found:
        raise InputError(f"expected the id of one line; {wanted} begins those of {len(found)}: give more digits")
    if (time := _read_time(wanted)) is None:
        known = ", ".join(line.id for line in readable[-5:])
        raise InputError(
            f"expected the id of a line of the history or of a patch, or a time such as 2026-11-28T17:30; got "
            f"{wanted!r}: give one; the last lines are {known or 'none'}"
        )
    before = [line for line in readable if line.entry and line.entry.at <= time]
    if not before:
        first = readable[0].entry.at.isoformat() if readable and readable[0].entry else "none"
        raise InputError(
            f"expected a time at which the stack had a history; {wanted} is before its first line: give one from "
            f"{first} on"
        )
    return before[-1]


def _read_time(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(f"{text[:-1]}+00:00" if text[-1:] in "Zz" else text)
    except ValueError:
        return None
    return time.astimezone()
