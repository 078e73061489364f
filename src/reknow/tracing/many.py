"""Traces of many facts as tasks, one fact each."""

from __future__ import annotations

from collections.abc import Container, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reknow.datasets.facts import Fact
from reknow.lm import LM
from reknow.tracing.causal import Tracing, embedding_std, trace_prompt
from reknow.tracing.known import known_facts

__all__ = ["KnownFacts", "TraceJob", "TraceTask", "find_known"]


@dataclass(frozen=True)
class KnownFacts:
    """What there is to trace in a model."""

    facts: tuple[Fact, ...]
    """Those that it knows."""
    std: float
    """Of the embeddings of subjects' tokens, see `embedding_std`."""
    model: str
    """Its name."""
    digest: str
    """Its fingerprint's."""


def find_known(lm: LM, facts: Sequence[Fact], every: Sequence[Fact]) -> KnownFacts:
    """The facts that the model knows, each prompt once; the noise is that of `every` fact of the set."""
    known = {fact.text: fact for fact in reversed(known_facts(lm, facts))}
    return KnownFacts(tuple(reversed(known.values())), embedding_std(lm, every), lm.name, lm.fingerprint.digest)


@dataclass(frozen=True)
class TraceTask:
    """One fact to trace."""

    fact: Fact
    place: str = ""

    def __str__(self) -> str:
        return f"tracing “{self.fact.text}”"


@dataclass(frozen=True)
class TraceJob:
    """Traces facts; its rows are those that `StoredTrace` reads."""

    std: float
    settings: Tracing
    lm: LM | None = None

    def begin(self, lm: LM, folder: Path | None) -> TraceJob:
        return replace(self, lm=lm)

    def keys(self, task: TraceTask) -> list[tuple]:
        return [(task.fact.text,)]

    def do(self, task: TraceTask, there: Container[tuple]) -> Generator[dict[str, Any], None, None]:
        if (task.fact.text,) not in there:
            assert self.lm is not None
            yield trace_prompt(self.lm, task.fact.prompt, task.fact.subject, self.std, self.settings).as_json()
