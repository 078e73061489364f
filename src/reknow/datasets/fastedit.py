"""FastEdit's files of edits (hiyouga 2023, github.com/hiyouga/FastEdit). No sample is bundled."""

from __future__ import annotations

from reknow.datasets.probes import optional_texts
from reknow.datasets.records import Record, place_subject
from reknow.edits import Case, Probe


def read_case(name: str, record: Record) -> Case:
    """A record {"prompt": "The mayor of {} is", "subject": …, "target": …, "queries": […]}.

    `queries` become generalization `query`: its authors write them to look at what the model then answers.
    """
    target = record.text("target")
    prompt, subject = place_subject(record.text("prompt"), record.text("subject"))
    edit = record.edit(prompt, subject=subject, target_new=target, id=f"{name}/{record.index}")
    queries = optional_texts(record, "queries")
    return Case(edit, tuple(Probe(query, (target,), "generalization", "query") for query in queries))
