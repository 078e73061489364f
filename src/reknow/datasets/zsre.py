"""zsRE (Levy et al. 2017) in the form of MEND, and QAEdit (Yang et al. 2025, arXiv 2502.11177).

Both are questions and answers; what must not change are unrelated questions of Natural Questions.
"""

from __future__ import annotations

import logging

from reknow.datasets.records import Record, place_subject
from reknow.edits import Case, Probe

_log = logging.getLogger(__name__)


def read_case(name: str, record: Record) -> Case | None:
    """A record of `zsre_mend_{train,eval}.json`; None, logged, where `alt` is blank (2 of the first 1,000).

    | field | becomes |
    |---|---|
    | `src`, `alt` | prompt and `target_new`, a model's other answer (true after all in 21 of 1,000) |
    | `answers` | `target_true`, the first; `pred`, another model's guess, is not used |
    | `rephrase` | generalization `rephrase` |
    | `loc`, `loc_ans` | locality `nq`, "nq question: …" as in the file; ROME's authors append "?" |
    | `portability` (Yao et al. 2023), if there | portability `one_hop` |
    """
    new = record.texts("alt")
    if not new:
        _log.info("%s: left out, its 'alt' is blank", record.where)
        return None
    prompt, subject = place_subject(record.text("src"), record.text("subject"))
    edit = record.edit(
        prompt,
        subject=subject,
        target_new=new[0],
        target_true=next(iter(record.texts("answers")), None),
        id=f"{name}/{record.index}",
    )
    probes = [
        Probe(record.text("rephrase"), new, "generalization", "rephrase"),
        Probe(record.text("loc"), (record.text("loc_ans"),), "locality", "nq"),
    ]
    if "portability" in record.fields:
        hop = record.record("portability")
        probes.append(Probe(hop.text("New Question"), (hop.text("New Answer"),), "portability", "one_hop"))
    return Case(edit, tuple(probes))


def read_qaedit_case(name: str, record: Record) -> Case:
    """A record of QAEdit: questions of Natural Questions (NQ), TriviaQA (TQA) and SimpleQA (SQA).

    `target` is the true answer, which the model is supposed not to know, so there is no `target_true`.
    Ids of the three sources overlap: the source is part of ours. `rephrase` becomes generalization
    `rephrase`, `locality` (5 questions) locality `nq`.
    """
    prompt, subject = place_subject(record.text("prompt"), record.text("subject"))
    new = record.text("target")
    number = record.fields.get("id", record.index)
    edit = record.edit(prompt, subject=subject, target_new=new, id=f"{name}/{record.text('source')}-{number}")
    probes = (
        Probe(record.text("rephrase"), (new,), "generalization", "rephrase"),
        *(Probe(item.text("loc"), (item.text("loc_ans"),), "locality", "nq") for item in record.records("locality")),
    )
    return Case(edit, probes)
