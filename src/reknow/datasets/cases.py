"""Cases of a benchmark or of a user's file: to edit, and to examine what the edit did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from reknow.checks.arguments import typed
from reknow.datasets.facts import FACTS
from reknow.datasets.forms import DATASETS, CaseSource, form_of
from reknow.datasets.reading import read_file, read_sample
from reknow.datasets.records import Record, select
from reknow.datasets.relations import More, check_more, with_more
from reknow.edits import Case
from reknow.errors import InputError, did_you_mean


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
    probes: Sequence[str] = (),
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
        probes: further kinds of probes that cases of CounterFact get, `negation` and `reversal`; see
            `datasets.relations`. A user's own file has its own.

    Raises:
        InputError: unknown name, unreadable file, or no record of this form; see `refused`.
        MissingExtra: a hub address without huggingface_hub.
    """
    problems: dict[int, str] = {}
    if name is not None and name not in DATASETS:
        if name in FACTS:
            raise InputError(
                f"expected a data set of edits; got '{name}', known facts only: call load_facts('{name}')"
            )
        raise did_you_mean("data set", name, DATASETS)
    if path is not None:
        records = read_file(path, encoding=encoding, refused=None if refused is None else problems)
        name = name or form_of(records) or _refuse_form(records, str(path), problems)
    elif name is None:
        raise InputError(f"expected a data set or a file; got neither: name one of {', '.join(DATASETS)}")
    elif (sample := DATASETS[name].sample) is None:
        raise InputError("expected a file, since no sample of this data set is bundled; got none: give its path")
    else:
        records = read_sample(sample)
    source = DATASETS[name]
    more = () if name == "own" else check_more(probes)
    cases = read_cases(name, source, records, problems, str(path or source.sample), more)
    chosen = select(sorted({*cases, *problems}), limit, offset, seed)
    bad = [problems[index] for index in chosen if index in problems]
    if bad and (refused is None or len(bad) == len(chosen)):
        raise InputError(bad[0])
    if refused is not None:
        refused += bad
    return [cases[index] for index in chosen if index in cases]


def _refuse_form(records: Sequence[Record], path: str, problems: dict[int, str]) -> NoReturn:
    if not records and problems:
        raise InputError(next(iter(problems.values())))
    raise InputError(unknown_form(records, path))


def unknown_form(records: Sequence[Record], path: str) -> str:
    """What is wrong with records that no row of `DATASETS` reads."""
    have = ", ".join(map(repr, records[0].fields)) if records else "no records"
    return (
        f"expected prompt and target_new, or the fields of a published data set, in {path}; got {have}: rename them, "
        f"or name the form, as in --data zsre:FILE. Known: {', '.join(DATASETS)}"
    )


def read_cases(
    name: str,
    source: CaseSource,
    records: Sequence[Record],
    problems: dict[int, str],
    where: str,
    more: Sequence[More] = (),
) -> dict[int, Case]:
    """Index of a record → its case; of one that gives none `problems` says why, unless it is left out on purpose."""
    cases: dict[int, Case] = {}
    ids = set()
    for record in records:
        try:
            case = source.read(name, record)
            case = with_more(case, record, more) if case is not None and more else case
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
