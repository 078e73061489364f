"""Shards: a work that several commands share without speaking to each other, each with files of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from reknow.errors import InputError
from reknow.files.locks import write_lock

__all__ = ["PATIENCE", "Shard", "part_files", "share_lock"]

_T = TypeVar("_T")
_NAME = re.compile(r"\.(\d+)-of-(\d+)\.jsonl$")
PART = "*.*-of-*.jsonl"
"""Names of all part files, as a pattern."""
PATIENCE = 60.0
"""Seconds that a shard waits for others to have opened the folder."""
_LOCK = ".lock"
"""How the names of locks end."""


@dataclass(frozen=True, order=True)
class Shard:
    """Share `number` of `of` equal ones, counted from 1."""

    of: int
    number: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that `I/N` names; raises InputError where it names none."""
        found = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
        number, of = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= of:
            raise InputError(f"expected a shard as I/N with I from 1 to N, such as 2/4; got {text!r}: correct it")
        return cls(of, number)

    def share(self, tasks: Sequence[_T]) -> list[_T]:
        """Its tasks: every N-th, so that all shards have about as many of each kind."""
        return list(tasks[self.number - 1 :: self.of])

    def file(self, path: Path) -> Path:
        """The part file of this shard beside the whole one, `cases.2-of-4.jsonl` beside `cases.jsonl`."""
        return path.with_name(f"{path.stem}.{self.number}-of-{self.of}{path.suffix}")

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"


def part_files(path: Path) -> dict[Shard, Path]:
    """The part files that there are beside a whole file, by their shards."""
    found = {}
    for part in path.parent.glob(f"{path.stem}{PART[1:]}"):
        if name := _NAME.search(part.name):
            found[Shard(int(name[2]), int(name[1]))] = part
    return dict(sorted(found.items()))


@contextmanager
def share_lock(whole: Path, shard: Shard | None) -> Iterator[None]:
    """While open, no other process writes to the folder of the file `whole`; with a shard, to that part.

    Raises:
        InputError: another one does, for a shard longer than a minute to the folder.
    """
    folder = whole.parent
    with ExitStack() as own:
        with write_lock(folder, wait=PATIENCE if shard else 0.0):
            if shard is not None:
                own.enter_context(write_lock(shard.file(whole)))
            else:
                pattern = f"{whole.stem}{PART[1:]}"
                locked = {path.name[1 : -len(_LOCK)] for path in folder.glob(f".{pattern}{_LOCK}")}
                for name in sorted(locked | {path.name for path in folder.glob(pattern)}):
                    with write_lock(folder / name):
                        pass
                yield
                return
        yield
