"""Questions as published files write them: two fields, a list of objects, or such lists by name."""

from __future__ import annotations

import logging

from reknow.datasets.records import Record
from reknow.edits import Kind, Probe

_log = logging.getLogger(__name__)

ANSWERS = ("ground_truth", "answer", "answers", "target")
"""Names of the field that holds the answer of a question."""


def first_text(record: Record, field: str) -> str:
    """The text of a field, or the first of its list of texts."""
    texts = record.texts(field) if isinstance(record.fields.get(field), list) else ()
    return texts[0] if texts else record.text(field)  # text() says what is wrong with a blank one


def optional_texts(record: Record, *fields: str) -> tuple[str, ...]:
    """The texts of those fields that are there."""
    return tuple(text for field in fields if record.has(field) for text in record.texts(field))


def read_probes(record: Record, field: str, kind: Kind, name: str) -> list[Probe]:
    """The probes in a field, none where it is absent.

    | form | name of the probes |
    |---|---|
    | `[{"prompt": …, "ground_truth": …}, …]` | `name` |
    | `{"Reasoning": [{"prompt": …, "ground_truth": …}, …], …}` (KnowEdit) | `Reasoning` … |
    | `{"one_hop": {"prompt": …, "ground_truth": …}, …}` (EasyEdit; one text or lists) | `one_hop` … |

    An answer stands in one of the fields `ANSWERS`: a text, a list, or a list of alias lists, which all become
    accepted answers in the file's order. A question without any is left out.
    """
    if not record.has(field):
        return []
    if not isinstance(record.fields[field], dict):
        return _list_probes(record.records(field), kind, name)
    groups = record.record(field)
    probes = []
    for group in filter(groups.has, groups.fields):
        if isinstance(groups.fields[group], dict):
            probes += pair_probes(groups.record(group), "prompt", "ground_truth", kind, group)
        else:
            probes += _list_probes(groups.records(group), kind, group)
    return probes


def _list_probes(items: list[Record], kind: Kind, name: str) -> list[Probe]:
    probes = []
    for item in items:
        field = next((field for field in ANSWERS if field in item.fields), ANSWERS[0])
        if answers := tuple(dict.fromkeys(item.texts(field))):
            probes.append(Probe(first_text(item, "prompt"), answers, kind, name))
        else:
            item.leave_out(item.fields.get("prompt"))
    return probes


def pair_probes(record: Record, prompts: str, answers: str, kind: Kind, name: str) -> list[Probe]:
    """The probes of two fields: a question and its answer, or as many of both; none where they are absent. A question
    without an answer is left out."""
    if not record.has(prompts):
        return []
    asked, given = record.entries(prompts), record.entries(answers)
    if len(asked) != len(given):
        record.refuse(answers, f"expected {len(asked)} answers, one per question; got {len(given)}: add or drop some")
    probes = []
    for question, answer in zip(asked, given, strict=True):
        if question and answer:
            probes.append(Probe(question, (answer,), kind, name))
        elif question:
            record.leave_out(question)
        elif answer:
            _log.info("%s: answer without a question left out: %s", record.where, answer)
    return probes
