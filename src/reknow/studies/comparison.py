"""The cases of a study that compares methods on one or several data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from reknow.datasets.cases import load_cases, parse_address
from reknow.edits import Case
from reknow.engine.jobs import Engine
from reknow.errors import InputError
from reknow.studies.preset import Selection
from reknow.tracing.known import known_cases


class LoadedSets(NamedTuple):
    """What a study's data sets hold for it."""

    sets: dict[str, list[Case]]
    """Name of each run → its cases."""
    refused: dict[str, list[str]]
    """Data set → why records of it could not be read."""
    conflicting: dict[str, int]
    """Data set → how many cases were left out since they contradict an earlier one."""

    def refused_of(self, run: str) -> list[str]:
        """Why records could not be read, of all sets of a run."""
        return [sentence for name in run.split("+") for sentence in self.refused.get(name, ())]


def load_sets(
    selection: Selection,
    knowing: Engine | None = None,
    *,
    one_patch: bool = False,
    offset: int = 0,
    shuffle: int | None = None,
    encoding: str | None = None,
    probes: Sequence[str] = (),
) -> LoadedSets:
    """The cases of a selection.

    Args:
        knowing: take the cases whose facts its model knows; None: all.
        one_patch: several make one patch, so take those that agree.
        probes: further kinds of probes, see `load_cases`.
        offset: cases of each set to pass over.
        shuffle: seed to shuffle them with.

    Raises:
        InputError: a set is named twice, or the model knows none of its facts.
    """
    loaded = LoadedSets({}, {}, {})
    for source in selection.data.split(","):
        label, name, path = parse_address(source.strip())
        if label in loaded.sets:
            raise InputError(f"expected every set once; got {label} twice: join the files, or run them one by one")
        wanted = selection.limits.get(label, selection.limit)
        limit = None if knowing or one_patch else wanted
        bad = loaded.refused.setdefault(label, [])
        part = {"limit": limit, "offset": offset, "seed": shuffle}
        cases = load_cases(name, path=path, encoding=encoding, refused=bad, probes=probes, **part)
        if knowing is not None:
            cases, of = knowing.ask(partial(known_cases, cases=cases)), len(cases)
            if not cases:
                who = knowing.ask(lambda lm: lm.name)
                raise InputError(f"expected facts that {who} knows; got none among {of}: leave --known out")
        if one_patch and len(kept := drop_conflicting(cases)) < len(cases):
            loaded.conflicting[label] = len(cases) - len(kept)
            cases = kept
        loaded.sets[label] = limit_probes(cases[:wanted], selection.probes_per_name)
    if selection.one_run:
        return loaded._replace(sets={"+".join(loaded.sets): merge_sets(list(loaded.sets.values()))})
    return loaded


def limit_probes(cases: Sequence[Case], count: int | None) -> list[Case]:
    """The cases with at most `count` probes of one kind and name each, the first ones; None: with all."""
    limited = []
    for case in cases:
        groups = [(probe.kind, probe.name) for probe in case.probes]
        probes = [p for i, p in enumerate(case.probes) if count is None or groups[:i].count(groups[i]) < count]
        limited.append(replace(case, probes=tuple(probes)))
    return limited


def drop_conflicting(cases: Sequence[Case]) -> list[Case]:
    """The cases without those that ask for another answer to an earlier one's prompt: no patch can make both."""
    answers: dict[str, str] = {}
    kept = []
    for case in cases:
        wanted = {edit.text: edit.target_new for edit in case.edits}
        if all(answers.get(prompt, answer) == answer for prompt, answer in wanted.items()):
            answers |= wanted
            kept.append(case)
    return kept


def merge_sets(sets: Sequence[Sequence[Case]]) -> list[Case]:
    """One list of all cases, taken from the sets in turn, in proportion to their sizes."""
    placed = [
        (number / len(cases), place, case) for place, cases in enumerate(sets) for number, case in enumerate(cases)
    ]
    return [case for *_, case in sorted(placed, key=lambda item: item[:2])]
