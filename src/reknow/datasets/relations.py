"""Negation and reversal: two more questions about an edit, by the relation of its fact.

Negated, a sentence must not be completed as the fact is: models complete "X is not located in" like "X is located in"
(Kassner, Schütze: Negated and Misprimed Probes, ACL 2020), and an edit may make the new answer follow both. Reversed,
the fact asks for its subject: models that learn "A is B" do not learn "B is A" (Berglund et al.: The Reversal Curse,
arXiv 2309.12288). Most relations have many subjects to one answer, so that no model has to name this one; how far a
reader who knows the fact gets is what the oracle shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from typing import Literal, get_args

from reknow.datasets.records import Record
from reknow.edits import Case, Probe
from reknow.errors import InputError, did_you_mean
from reknow.texts.templates import fill

__all__ = ["MORE", "More", "check_more", "with_more"]

More = Literal["negation", "reversal"]
MORE: tuple[More, ...] = get_args(More)
"""Kinds of probes that cases have only where they are asked for, or where a user's own file has them."""


def check_more(kinds: Sequence[str]) -> tuple[More, ...]:
    """The kinds; raises InputError where one is unknown or there twice."""
    for kind in kinds:
        if kind not in MORE:
            raise did_you_mean("kind of probe", kind, MORE)
    if len(set(kinds)) < len(kinds):
        raise InputError(f"expected each kind of probe once; got {', '.join(kinds)}: drop one")
    return tuple(kind for kind in MORE if kind in kinds)


def with_more(case: Case, record: Record, kinds: Sequence[More]) -> Case:
    """The case of a record of CounterFact with a probe of each kind behind its own.

    Raises:
        InputError: the record has no relation of the table `assets/relations.json`.
    """
    rewrite = record.fields.get("requested_rewrite")
    relation = rewrite.get("relation_id") if isinstance(rewrite, dict) else None
    if relation not in _templates():
        raise InputError(
            f"expected records of CounterFact with a relation_id that has templates for {' and '.join(kinds)}; got "
            f"{relation!r}: leave --probes out, or give the questions in a file of your own"
        )
    edit, templates = case.edit, _templates()[relation]
    asked = {
        "negation": lambda: (fill(templates["negated"], edit.subject), edit.target_new),
        "reversal": lambda: (fill(templates["reversed"], edit.target_new), edit.subject or ""),
    }
    more = []
    for kind in kinds:
        prompt, answer = asked[kind]()
        more.append(Probe(prompt, (answer,), kind, kind))
    return replace(case, probes=(*case.probes, *more))


@lru_cache
def _templates() -> dict[str, dict[str, str]]:
    """Relation → its sentences with `{}` for the subject (negated) or the answer (reversed)."""
    return json.loads((files("reknow") / "assets" / "relations.json").read_text(encoding="utf-8"))
