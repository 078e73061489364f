"""The patches of a stack as the page lists them: those that are on, and between them those that were switched off.

A patch that is off is one that a change called `OFF` took out of the stack; another change that takes it out forgets
it. The folder's history knows that, and nothing else has to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from reknow.files.outputs import STACK_FILE
from reknow.patching.history import Entry
from reknow.patching.patches import Patch
from reknow.patching.stack import applied_ids, read_existing, read_history

OFF, ON = "off", "on"
"""What the history calls switching."""


class Kept(NamedTuple):
    """A patch of a stack as the page lists it."""

    patch: Patch
    on: bool
    by: str
    at: datetime | None
    why: str


class Listed(NamedTuple):
    """Ids in their order, and those among them that are off."""

    order: tuple[str, ...] = ()
    off: frozenset[str] = frozenset()


class Counts(NamedTuple):
    """How many patches of a stack are on, and how many off."""

    on: int
    off: int


def read_kept(folder: Path) -> list[Kept]:
    """All patches of the stack with who put them on, the switched off ones at the places where they stood; none where
    there is no stack yet.

    Raises:
        PatchError: the folder is broken.
    """
    if not (folder / STACK_FILE).exists():
        return []
    entries = _entries(folder)
    on = {patch.id: patch for patch in read_existing(folder)[1]}
    put = dict[str, Entry]()
    for entry in entries:
        anew = entry.action != ON and entry.to is None
        put |= {one.id: entry for one in entry.applied if anew or one.id not in put}
    found = []
    for patch_id in _listed(entries, list(on)):
        patch = on.get(patch_id) or Patch.load(folder / f"{patch_id}.patch")
        entry = put.get(patch_id)
        found.append(Kept(patch, patch_id in on, *((entry.by, entry.at, entry.why) if entry else ("", None, ""))))
    return found


def count_kept(folder: Path) -> Counts:
    """How many there are, without their files being read.

    Raises:
        PatchError: the folder is broken.
    """
    if not (folder / STACK_FILE).exists():
        return Counts(0, 0)
    entries, on = _entries(folder), applied_ids(folder)
    return Counts(len(on), len(_listed(entries, on)) - len(on))


def _entries(folder: Path) -> list[Entry]:
    return [line.entry for line in read_history(folder) if line.entry]


def _listed(entries: Iterable[Entry], on: Sequence[str]) -> list[str]:
    """The ids in their order, those that are off too."""
    listed = ([*listings(entries).values()] or [Listed()])[-1]
    return _merged(listed.order, on, listed.off - set(on))  # what is in the folder counts, whatever its history says


def listings(entries: Iterable[Entry]) -> dict[str, Listed]:
    """What was listed after each change, by the hash of its line."""
    found: dict[str, Listed] = {}
    last = Listed()
    for entry in entries:
        back = next((listed for line, listed in found.items() if entry.to and line.startswith(entry.to)), None)
        order, off = back or last
        gone = frozenset(entry.reverted)
        off = off if back else off | gone if entry.action == OFF else off - gone
        off -= set(entry.patches)
        last = found[entry.hash] = Listed(tuple(_merged(order, entry.patches, off)), off)
    return found


def _merged(order: Sequence[str], on: Sequence[str], off: Set[str]) -> list[str]:
    """The ids that are on, in their order, between those that are off, which stay where they stood."""
    left = iter(on)
    stood = [patch_id for patch_id in order if patch_id in off or patch_id in on]
    found = [patch_id if patch_id in off else next(left) for patch_id in stood]
    return [*found, *left]
