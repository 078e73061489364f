"""True statements that a model may already know, for causal tracing and for finding the layer to edit.

known_1000 (Meng et al. 2022), ParaRel (Elazar et al. 2021, facts of T-REx), LRE (Hernandez et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from reknow.checks.arguments import typed
from reknow.datasets.reading import read_file, read_sample
from reknow.datasets.records import Record, place_subject, select
from reknow.errors import InputError, did_you_mean
from reknow.texts.templates import fill, split_template


@dataclass(frozen=True)
class Fact:
    """A true statement: `Fact("{} is located in the continent of", "Vinson Massif", "Antarctica")`.

    Raises:
        InputError: a field is empty, or the prompt does not hold exactly one `{}`.
    """

    prompt: str
    subject: str
    answer: str
    paraphrases: tuple[str, ...] = ()
    """Other prompts with `{}` for the same question, where the data set has some."""

    def __post_init__(self):
        if len(split_template(self.prompt)) != 2 or not (self.subject.strip() and self.answer.strip()):
            raise InputError(
                f"expected a prompt with one {{}}, a subject and an answer; got {self}: fill in the missing"
            )

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return fill(self.prompt, self.subject)


def _read_known(record: Record) -> list[Fact]:
    """A record of `known_1000.json`, which holds 1,209 facts that GPT-2 XL knows.

    `prompt` is the traced text. `template` is not used: in 478 records it stops short of the words that
    GPT-2 XL itself wrote before the answer, so the answer is not what follows it.
    """
    prompt, subject = place_subject(record.text("prompt"), record.text("subject"))
    if subject is None:
        record.refuse("subject", f"expected it in {prompt!r}; got {record.text('subject')!r}: correct one of them")
    return [Fact(prompt, subject, record.text("attribute"))]


def _read_pararel(record: Record) -> list[Fact]:
    """A relation: `patterns` with [X] and [Y], `facts` with T-REx's `sub_label` and `obj_label`.

    Each fact is asked in the first pattern that ends in its object, and the other such patterns are its
    paraphrases; a relation without any gives no facts.
    """
    patterns = [pattern.rstrip(" .") for pattern in record.texts("patterns")]
    ending = [p.removesuffix("[Y]").strip() for p in patterns if p.endswith(" [Y]") and p.count("[X]") == 1]
    prompts = list(dict.fromkeys(p.replace("[X]", "{}") for p in ending))
    return [
        Fact(prompts[0], fact.text("sub_label"), fact.text("obj_label"), tuple(prompts[1:]))
        for fact in record.records("facts")
        if prompts
    ]


def _read_relation(record: Record) -> list[Fact]:
    """A relation file of LRE: `samples` of `subject` and `object` in the first of its `prompt_templates`."""
    return [
        Fact(prompt, pair.text("subject"), pair.text("object"))
        for prompt in record.texts("prompt_templates")[:1]
        for pair in record.records("samples")
    ]


def _read_counterfact(record: Record) -> list[Fact]:
    """The true fact of a record of the authors' `counterfact.json`."""
    rewrite = record.record("requested_rewrite")
    answer = rewrite.record("target_true").text("str")
    return [Fact(rewrite.text("prompt"), rewrite.text("subject"), answer)]


class _Source(NamedTuple):
    """A bundled sample, and how one record of it becomes facts."""

    sample: str
    read: Callable[[Record], list[Fact]]
    licence: str
    source: str


FACTS: dict[str, _Source] = {
    "known_1000": _Source("known_1000.jsonl", _read_known, "MIT", "github.com/kmeng01/rome"),
    "counterfact": _Source("counterfact.jsonl", _read_counterfact, "MIT", "github.com/kmeng01/rome"),
    "pararel": _Source("pararel.jsonl", _read_pararel, "MIT", "github.com/yanaiela/pararel"),
    "lre": _Source("lre.jsonl", _read_relation, "MIT", "github.com/evandez/relations"),
}


@typed
def load_facts(
    name: str,
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    offset: int = 0,
    seed: int | None = None,
) -> list[Fact]:
    """True statements of the set `name`; arguments and errors as in `load_cases`."""
    if name not in FACTS:
        raise did_you_mean("set of facts", name, FACTS)
    facts = list(_bundled(name)) if path is None else _facts(name, read_file(path))
    return select(facts, limit, offset, seed)


@cache
def _bundled(name: str) -> tuple[Fact, ...]:
    """The facts of the sample, read once: methods ask for them with every edit."""
    return tuple(_facts(name, read_sample(FACTS[name].sample)))


def _facts(name: str, records: Iterable[Record]) -> list[Fact]:
    return [fact for record in records for fact in FACTS[name].read(record)]
