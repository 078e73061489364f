"""Benchmarks as cases, known facts, plain text and users' edit files.

A data set is one line in the table `DATASETS` (cases to edit and examine) or `FACTS` (true statements).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from reknow.checks.arguments import typed
from reknow.datasets import counterfact, known
from reknow.datasets.edits_file import load_edits
from reknow.datasets.forms import DATASETS, CaseSource, form_of, read_file
from reknow.datasets.known import Fact
from reknow.datasets.reading import Record, read_records
from reknow.datasets.text import sample_text
from reknow.edits import Case
from reknow.errors import InputError, did_you_mean

__all__ = ["DATASETS", "FACTS", "Fact", "load_cases", "load_edits", "load_facts", "parse_address", "sample_text"]

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class FactSource(NamedTuple):
    """A bundled sample, and how one record of it becomes facts."""

    sample: str
    read: Callable[[Record], list[Fact]]


FACTS: dict[str, FactSource] = {
    "known_1000": FactSource("known_1000.jsonl", known.read_known),
    "counterfact": FactSource("counterfact.jsonl", counterfact.read_facts),
    "pararel": FactSource("pararel.jsonl", known.read_pararel),
    "lre": FactSource("lre.jsonl", known.read_relation),
}


class Address(NamedTuple):
    """What `bench --data` names: NAME, NAME:FILE or FILE."""

    label: str
    """What to call the set."""
    name: str | None
    """None: the form of the file is known by its fields."""
    path: str | None


def parse_address(text: str) -> Address:
    """The data set, the file, or both, that a user names."""
    name, _, path = text.partition(":")
    if name in DATASETS:
        return Address(name, name, path or None)
    if name == "hub" or "/" in text or Path(text).suffix or Path(text).exists():
        return Address(Path(text.rpartition(":")[2]).stem, None, text)
    return Address(name, name, path or None)


@typed
def load_cases(
    name: str | None = None,
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    seed: int | None = None,
    encoding: str | None = None,
    refused: list[str] | None = None,
) -> list[Case]:
    """Cases of a benchmark, in the order of the file, or shuffled where a `seed` is given.

    `path` is a local file in the published form of the data set `name`, or `hub:owner/name[:file]`, which is
    downloaded; without it the bundled sample is read. Without a name the form is known by the file's fields. After
    shuffling, `offset` cases are passed over and at most `limit` kept. Ids are `name/…`, the same whatever was
    selected, but for those that a user's own file gives.

    Args:
        encoding: of the file; None: what its byte order mark says, else UTF-8.
        refused: takes a sentence (file, record, field, complaint) about every selected record that is not of this
            form, so that a run can go on without it. None: the first one is raised.

    Raises:
        InputError: unknown name, unreadable file, or no record of this form; see `refused`.
        MissingExtra: a hub address without huggingface_hub.
    """
    problems: dict[int, str] = {}
    if name is None:
        if path is None:
            raise InputError(f"expected a data set or a file; got neither: name one of {', '.join(DATASETS)}")
        records = read_file(path, encoding=encoding, refused=None if refused is None else problems)
        name = form_of(records) or _unknown_form(records, str(path), problems)
    elif name not in DATASETS:
        if name in FACTS:
            raise InputError(
                f"expected a data set of edits; got '{name}', known facts only: call load_facts('{name}')"
            )
        raise did_you_mean("data set", name, DATASETS)
    else:
        records = _records(DATASETS[name].sample, path, encoding, None if refused is None else problems)
    source = DATASETS[name]
    cases = _cases(name, source, records, problems, str(path or source.sample))
    chosen = _select(sorted({*cases, *problems}), limit, offset, seed)
    bad = [problems[index] for index in chosen if index in problems]
    if bad and (refused is None or len(bad) == len(chosen)):
        raise InputError(bad[0])
    if refused is not None:
        refused += bad
    return [cases[index] for index in chosen if index in cases]


def _unknown_form(records: Sequence[Record], path: str, problems: dict[int, str]) -> NoReturn:
    if not records and problems:
        raise InputError(next(iter(problems.values())))
    have = ", ".join(map(repr, records[0].fields)) if records else "no records"
    raise InputError(
        f"expected prompt and target_new, or the fields of a published data set, in {path}; got {have}: rename them, "
        f"or name the form, as in --data zsre:FILE. Known: {', '.join(DATASETS)}"
    )


def _cases(
    name: str, source: CaseSource, records: Sequence[Record], problems: dict[int, str], where: str
) -> dict[int, Case]:
    """Index of a record → its case; of one that gives none `problems` says why, unless it is left out on purpose."""
    cases: dict[int, Case] = {}
    ids = set()
    for record in records:
        try:
            case = source.read(name, record)
        except InputError as error:
            problems[record.index] = record.placed(error)
            continue
        if case is not None and case.edit.id in ids:
            problems[record.index] = (
                f"expected a different id for every edit in {where}; got {case.edit.id!r} twice: rename one"
            )
        elif case is not None:
            cases[record.index] = case
            ids.add(case.edit.id)
    return dict(zip(cases, source.link(list(cases.values())), strict=True))


@typed
def load_facts(
    name: str,
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    seed: int | None = None,
) -> list[Fact]:
    """True statements; arguments and errors as in `load_cases`."""
    if name not in FACTS:
        raise did_you_mean("set of facts", name, FACTS)
    source = FACTS[name]
    facts = [fact for record in _records(source.sample, path) for fact in source.read(record)]
    return _select(facts, limit, offset, seed)


def _records(
    sample: str | None,
    path: str | Path | None,
    encoding: str | None = None,
    refused: dict[int, str] | None = None,
) -> list[Record]:
    if path is None:
        if sample is None:
            raise InputError("expected a file, since no sample of this data set is bundled; got none: give its path")
        return read_records(files("reknow") / "assets" / "data" / sample, sample)
    return read_file(path, encoding=encoding, refused=refused)


def _select(items: list[Item], limit: int | None, offset: int, seed: int | None) -> list[Item]:
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
        logger.warning("expected %d records; there are only %d after the offset", limit, len(chosen))
    return chosen
