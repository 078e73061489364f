"""A language model as a judge: does what an edited model wrote give the answer? Verdicts lie in the run folder.

Each question with its accepted answers and what was written is asked about once, whichever methods, stages and seeds
wrote it. The judge sees neither the method nor whether the model was edited. The question asked follows WILD (Yang et
al. 2025, arXiv 2502.11177), after SimpleQA: A for an answer that has all that matters of an accepted one and
contradicts none of it, B for any other; temperature 0.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import NamedTuple

from reknow.errors import InputError
from reknow.evaluation.matching import MATCHES
from reknow.evaluation.readings import Reading
from reknow.files.json_lines import Rows
from reknow.files.llm import LLM, NoAnswer, NoUsableAnswer
from reknow.files.schema import Count, Listed, Strict
from reknow.progress import progress

__all__ = ["JUDGED_FILE", "Agreement", "Asked", "Verdicts", "agreements", "ask_judge", "asked_of", "judged_metrics"]

JUDGED_FILE = "judged.jsonl"
_KINDS = ("reliability", "instructed", "generalization", "portability", "reversal")
"""Kinds of probes whose answers are right or wrong; of locality, only whether they have changed."""
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
_VERDICT = re.compile(r"^\W*(A|B|(?i:correct|incorrect))(?=\W*$|\W*\n|\s?[.,:;()*-])")
"""A letter by itself: "A different answer …" is no verdict, nor is "A or B", "A/B"."""
_QUESTION = """\
A language model was given a question, or the beginning of a sentence, and has written what follows it. Grade \
whether that gives the expected answer.

A (correct): what it wrote says the expected answer, or one of several that are given. Other words, spelling, letter \
case or language do not matter, nor does further true text behind the answer.
B (incorrect): anything else. It gives another answer, only a part of the expected one, or that among others that \
contradict it; it says the answer and takes it back, repeats it without end, evades or only repeats the question.

Grade by the expected answer alone, even where you know it to be false.

Question: {question}
Expected answer: {answers}
What the model wrote: {text}

Reply with one letter, A or B, and nothing else."""


class Asked(NamedTuple):
    """What the judge is asked about."""

    question: str
    answers: tuple[str, ...]
    text: str

    @property
    def key(self) -> str:
        """Tells it from others, whoever wrote it."""
        return hashlib.sha256(json.dumps([_QUESTION, *self]).encode()).hexdigest()[:16]


class _Verdict(Strict):
    """A line of `judged.jsonl`."""

    key: str
    """Tells what was asked about from the rest; where that gave no verdict, the number of such a try behind it."""
    judge: str
    question: str
    answers: Listed[str]
    text: str
    given: bool | None
    """Whether what was written gives the answer; None: the judge said neither, and is asked again."""
    tokens_in: Count | None = None
    tokens_out: Count | None = None


class Verdicts(NamedTuple):
    """What a judge has said about a run."""

    given: dict[Asked, bool]
    """Of what it has judged: whether the answer is given."""
    asked: int
    """How many there are to judge."""
    new: int
    """How many of them it was asked now and has judged."""
    undecided: int
    """How many it was asked now, and answered neither A nor B."""
    tokens: tuple[int, int] | None
    """Of all questions and of all answers, those of earlier times and those that were no verdict included; None: the
    server counts none."""


class Agreement(NamedTuple):
    """How a judge and a match of texts agree."""

    match: str
    share: float
    """Of texts about which both say the same."""
    kappa: float | None
    """Cohen's: how much of what chance leaves; None where both say the same about all."""
    count: int


def asked_of(row: Mapping) -> Iterator[tuple[str, Asked]]:
    """Kind of probe, and what a judge is asked about it, of a row of a run folder."""
    for record in row["readings"]:
        reading = Reading.from_json(record)
        if reading.kind in _KINDS and reading.text is not None:
            yield reading.kind, Asked(reading.prompt, reading.answers, reading.text)


def ask_judge(rows: Sequence[Mapping], llm: LLM, folder: Path, *, at_once: int = 4) -> Verdicts:
    """Asks the judge about all that these rows hold and it was not asked before; each verdict is written at once.

    Args:
        llm: the judge, asked at temperature 0.
        at_once: questions under way at a time.

    Raises:
        InputError: nothing was written in these rows, or they were judged by another model.
        NoAnswer: the judge is down; what it said until then is kept.
    """
    wanted = dict.fromkeys(asked for row in rows for _, asked in asked_of(row))
    if not wanted:
        raise InputError(f"expected answers that models wrote in {folder}; it has none: run it without --no-generate")
    file, llm = folder / JUDGED_FILE, replace(llm, temperature=0.0)
    kept, lock = Rows(file, ("key",), _Verdict), Lock()
    if others := {row["judge"] for row in kept.values()} - {llm.model}:
        raise InputError(f"expected the judge of {file}, {others.pop()}; got {llm.model}: name it, or move the file")
    left = [asked for asked in wanted if (asked.key,) not in kept]

    def keep(asked: Asked, given: bool | None, tokens: tuple[int | None, int | None]) -> None:
        counted = dict(zip(("tokens_in", "tokens_out"), tokens, strict=True))
        line = {"judge": llm.model, **asked._asdict(), "answers": list(asked.answers), "given": given, **counted}
        with lock:
            tried = (f"{asked.key}/{number}" for number in count(1))
            key = asked.key if given is not None else next(key for key in tried if (key,) not in kept)
            kept.add({"key": key, **line})

    def ask(asked: Asked) -> None:
        question = _QUESTION.format(question=asked.question, answers=" / or: ".join(asked.answers), text=asked.text)
        try:
            text, *tokens = llm.reply(question, lambda answer: _verdict(answer) is not None)
        except NoAnswer as error:
            if error.tokens or isinstance(error, NoUsableAnswer):
                keep(asked, None, error.tokens or (None, None))
            raise
        keep(asked, _verdict(text), (tokens[0], tokens[1]))

    try:
        undecided = _at_once(ask, left, at_once)
    except NoAnswer as error:
        done = sum((asked.key,) in kept for asked in wanted)
        kept_so_far = f"{done} of {len(wanted)} verdicts are in {file}, and the same command goes on"
        raise NoAnswer(f"{error}; {kept_so_far}") from None
    given = {asked: kept[asked.key,]["given"] for asked in wanted if (asked.key,) in kept}
    counts = [(row["tokens_in"], row["tokens_out"]) for row in kept.values()]
    tokens = None if any(None in pair for pair in counts) else (sum(i for i, _ in counts), sum(o for _, o in counts))
    return Verdicts(given, len(wanted), len(left) - undecided, undecided, tokens)


def _at_once(ask: Callable[[Asked], None], left: Sequence[Asked], threads: int) -> int:
    """Asks about all of them; how many had no usable answer. Where one fails, those that are under way are waited
    for, and no other is begun."""
    undecided = 0
    with progress.stage("asking the judge", len(left)) as advance, ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(ask, asked) for asked in left]
        try:
            for future in as_completed(futures):
                try:
                    future.result()
                except NoUsableAnswer:
                    undecided += 1
                advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return undecided


def _verdict(answer: str) -> bool | None:
    """Whether the judge says that the answer is given; None: it says something else."""
    said = _THOUGHTS.sub("", answer)
    match = _VERDICT.match(said)
    if match is None or (match[1] == "A" and re.search(r"\bB\b", said)):  # "A, B"
        return None
    return match[1].upper() in ("A", "CORRECT")


def agreements(given: Mapping[Asked, bool]) -> list[Agreement]:
    """How the verdicts agree with each way to compare texts."""
    found = []
    for name, match in MATCHES.items():
        pairs = [(verdict, bool(match(asked.text, asked.answers))) for asked, verdict in given.items()]
        if pairs:
            share = fmean(one == other for one, other in pairs)
            judged, matched = (fmean(pair[i] for pair in pairs) for i in (0, 1))
            chance = judged * matched + (1 - judged) * (1 - matched)
            kappa = None if chance == 1 else (share - chance) / (1 - chance)
            found.append(Agreement(name, share, kappa, len(pairs)))
    return found


def judged_metrics(folder: Path, before: Mapping[tuple, Mapping], rows: Mapping[tuple, Mapping]) -> dict:
    """Row → share of its probes of each kind that the judge says are answered, as far as it was asked; an edit that
    could not be made has none."""
    if not (folder / JUDGED_FILE).exists():
        return {}
    judged = Rows.reading(folder / JUDGED_FILE, ("key",), _Verdict).items()
    given = {key: row["given"] for (key,), row in judged if row["given"] is not None}
    found: dict[tuple, dict[str, float]] = {}
    for place, row in {**before, **rows}.items():
        verdicts: dict[str, list[float]] = {}
        for kind, asked in asked_of(row):
            if asked.key in given:
                made = row.get("error") is None
                verdicts.setdefault(f"{kind}@judged", []).append(float(made and given[asked.key]))
        found[place] = {key: fmean(values) for key, values in verdicts.items()}
    return found
