"""The search for instructions: propose, try, hand the scores back, until no metric rises (InstructEdit, §3.2).

Every proposal and every score is a line in the folder before the next step begins, so a killed search goes on where
it was, and whatever a proposer does later takes nothing of it away. A search of no rounds scores what is there.

Ranks are read off a few cases, so they are said with what they are worth: how far each instruction's mean score is
behind the best one's on the same cases, with a 95 % interval. Where that reaches 0, the two are not told apart.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reknow.checks.bounds import Natural, Number, Seed, check_settings
from reknow.datasets.families import Family, Instruction
from reknow.errors import InputError
from reknow.evaluation.intervals import Mean, resample, with_interval
from reknow.files.json_lines import Rows
from reknow.files.llm import NoAnswer
from reknow.files.locks import write_lock
from reknow.files.manifest import open_manifest
from reknow.instructions.propose import Proposer, is_usable
from reknow.progress import progress

_log = logging.getLogger(__name__)

PROPOSALS_FILE, SCORES_FILE = "proposals.jsonl", "scores.jsonl"
_RISE = 1e-3
"""A metric that rises by less stands still."""

_Values = Mapping[str, Sequence[float | None]]
_Scorer = Callable[[Family, str], _Values]
"""What the trial editor reaches with an instruction in front: metric → share for each case, always the same cases;
None where a case has no such question."""


@dataclass(frozen=True)
class Search:
    """How long and how broadly to search."""

    count: int = 10
    """Instructions to keep of each family; the last place goes to one that is not for training."""
    proposals: Number = 5
    """Per round."""
    rounds: Natural = 6
    """At most; 0: nothing is proposed, all instructions of a family are scored, and stay in their order."""
    seed: Seed = 0
    """Seeds the choice of the unseen instruction."""

    def __post_init__(self):
        check_settings(self)
        if self.count < 2:
            raise InputError(f"expected a count of at least 2, one seen and one unseen; got {self.count}: raise it")


@dataclass(frozen=True)
class SearchResult:
    """What a search ended with."""

    families: list[Family]
    cost: dict[str, float]
    """Seconds of trials, trials, and what the proposer spent, in this call."""
    stopped: dict[str, str]
    """Family → why its search ended."""
    behind: dict[str, dict[str, Mean]]
    """Family → instruction that was kept → how far its mean score is behind the best one's, with its interval."""


def search(
    families: Sequence[Family],
    proposer: Proposer,
    score: _Scorer,
    out: str | Path,
    settings: Search = Search(),
    *,
    about: Mapping[str, Any] | None = None,
    report: Callable[[str], object] = lambda text: None,
) -> SearchResult:
    """Searches instructions for each family, beginning with its first one.

    Args:
        out: folder of the log; the same call on the same folder goes on where a killed one was.
        about: what else must be the same for that: model, trial editor, cases.
        report: called with every step in words.

    Returns:
        The families with the instructions that scored highest, best first, one of them marked as unseen; after no
        rounds with those that they had.

    Raises:
        InputError: a family without an instruction to begin with, a folder of another search, or one where another
            process writes.
    """
    folder = Path(out)
    starts = {family.name: family.texts()[0] for family in families}
    tasks = {family.name: asdict(replace(family, instructions=())) for family in families}
    asked = {"search": asdict(settings), "proposer": proposer.name, "starts": starts, **(about or {}), "tasks": tasks}
    with write_lock(folder):
        # Searches of earlier versions do not say what their tasks were.
        open_manifest(folder, asked, {"kind": "instruction search"}, lambda before: {"tasks": tasks} | before)
        run = _Run(proposer, score, folder, settings, report)
        searched = [run.family(family, starts[family.name]) for family in progress.each("families", families)]
    cost = {"seconds of trials": round(run.seconds, 1), "trials": run.trials, **proposer.cost()}
    return SearchResult(searched, cost, run.stopped, {family.name: run.behind(family) for family in searched})


class _Run:
    def __init__(self, proposer: Proposer, score: _Scorer, folder: Path, settings: Search, report: Callable):
        self.proposer, self.score, self.settings, self.report = proposer, score, settings, report
        self.proposals = Rows(folder / PROPOSALS_FILE, ("family", "round"))
        self.scores = Rows(folder / SCORES_FILE, ("family", "text"))
        self.seconds, self.trials, self.stopped = 0.0, 0, dict[str, str]()

    def family(self, family: Family, start: str) -> Family:
        """One family's search: rounds of proposals, each tried, until nothing rises."""
        self.stopped[family.name] = f"{self.settings.rounds or 'no'} rounds were made"
        if not self.settings.rounds:
            own = progress.each("trying instructions", family.instructions, parts=1)
            scored = [replace(self.trial(family, each.text, 0), seen=each.seen) for each in own]
            return replace(family, instructions=tuple(scored))
        tried = [self.trial(family, start, 0)]
        for round in progress.each("rounds", range(1, self.settings.rounds + 1), parts=1):
            texts = self.proposed(family, _rank(tried), round)
            if texts is None:
                break
            best = _best(tried)
            asked = progress.each("trying instructions", texts, parts=1)
            tried += [self.trial(family, text, round) for text in asked]
            risen = [name for name, value in _best(tried).items() if value > best.get(name, -1.0) + _RISE]
            self.report(f"{family.name}, round {round}: {', '.join(risen) or 'nothing'} rose")
            if not risen and len(tried) >= self.settings.count:
                self.stopped[family.name] = "no metric rose"
                break
        return replace(family, instructions=self.chosen(family, tried))

    def proposed(self, family: Family, scored: Sequence[Instruction], round: int) -> list[str] | None:
        """The proposals of a round; None where the proposer fails, which ends the family's search."""
        if (family.name, round) not in self.proposals:
            try:
                texts = self.proposer.propose(family, scored, self.settings.proposals, round)
            except NoAnswer as error:
                self.stopped[family.name] = "the proposer gave no answer"
                _log.warning("%s; the search for %s ends with %d instructions", error, family.name, len(scored))
                return None
            known = {each.text for each in scored}
            texts = [text for text in dict.fromkeys(texts) if is_usable(text) and text not in known]
            if not texts:
                self.stopped[family.name] = "the proposer had nothing new"
                return None
            self.proposals.add({"family": family.name, "round": round, "texts": texts})
        return self.proposals[family.name, round]["texts"]

    def trial(self, family: Family, text: str, round: int) -> Instruction:
        """The instruction with its scores, from the log where they are there."""
        if (family.name, text) not in self.scores:
            started = time.perf_counter()
            values = {name: [_rounded(value) for value in of] for name, of in self.score(family, text).items()}
            scores = {name: mean_of_cases(of) for name, of in values.items()}
            seconds = time.perf_counter() - started
            self.seconds, self.trials = self.seconds + seconds, self.trials + 1
            row = {
                "family": family.name,
                "text": text,
                "round": round,
                "scores": scores,
                "values": values,
                "seconds": _rounded(seconds),
            }
            self.scores.add(row)
            self.report(f"{family.name}, round {round}: {mean(scores):.3f} {text}")
        return Instruction(text, True, self.scores[family.name, text]["scores"])

    def behind(self, family: Family) -> dict[str, Mean]:
        """What `SearchResult` says of a family's instructions."""
        ranked = _rank(family.instructions)
        values = {each.text: self.scores[family.name, each.text].get("values") for each in ranked}
        best = values[ranked[0].text] if ranked else None
        rest = {text: of for text, of in values.items() if of is not None and text != ranked[0].text}
        return {} if best is None else {text: difference(best, of) for text, of in rest.items()}

    def chosen(self, family: Family, tried: Sequence[Instruction]) -> tuple[Instruction, ...]:
        """The best ones; one of them, drawn by chance so that it is no worse than the others, stays unseen."""
        best = _rank(tried)[: self.settings.count]
        if len(best) < self.settings.count:
            _log.warning("%s has %d instructions of %d wanted", family.name, len(best), self.settings.count)
        if len(best) < 2:  # nothing to spare
            return tuple(best)
        unseen = random.Random(f"{self.settings.seed}/{family.name}").randrange(len(best))
        return (*best[:unseen], *best[unseen + 1 :], replace(best[unseen], seen=False))


def _rank(tried: Sequence[Instruction]) -> list[Instruction]:
    """Best mean of the metrics first; the earlier one where they are equal."""
    return sorted(tried, key=lambda each: -mean(each.scores))


def mean(scores: Mapping[str, float]) -> float:
    """The mean of the metrics, by which instructions are ranked."""
    return sum(scores.values()) / len(scores) if scores else 0.0


def _best(tried: Sequence[Instruction]) -> dict[str, float]:
    """The highest value of each metric so far."""
    names = dict.fromkeys(name for each in tried for name in each.scores)
    return {name: max(each.scores.get(name, -1.0) for each in tried) for name in names}


def difference(one: _Values, other: _Values) -> Mean:
    """The mean over metrics of what `one` has more than `other`, and its 95 % interval over the cases of both.

    Where the interval reaches 0, the cases do not tell the two apart.
    """
    pairs = {name: (np.array(one[name], float), np.array(other[name], float)) for name in one if name in other}
    means = np.mean([resample(mine - theirs) for mine, theirs in pairs.values()], axis=0)
    return with_interval(means, max(len(mine) for mine, _ in pairs.values()))


def mean_of_cases(values: Sequence[float | None]) -> float:
    """A metric's score: the mean of its values on the cases that have it."""
    return round(float(np.nanmean(np.array(values, float))), 4)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)
