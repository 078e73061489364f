"""MQuAKE (Zhong et al. 2023, arXiv 2305.14795): what follows from several edits. No sample is bundled."""

from __future__ import annotations

from reknow.datasets.records import Record
from reknow.edits import Case, Edit, Probe


def read_case(name: str, record: Record) -> Case:
    """A record of any of its files (MQuAKE-CF, -CF-3k, -T, -hard).

    | field | becomes |
    |---|---|
    | `requested_rewrite` (1 to 4) | the edit and those that are made together with it |
    | their `question` | generalization `question`, answer `target_new` |
    | `questions` (3) | portability `multi_hop`, answers `new_answer` and `new_answer_alias` |
    | `new_single_hops` that no edit changes | locality `single_hop`, with their aliases |

    The authors count a case as right where one of the three questions is; `portability` is the share of them.
    """
    number = record.fields.get("case_id", record.index)
    edits, probes = [], []
    for place, rewrite in enumerate(record.records("requested_rewrite")):
        edits.append(_edit(rewrite, f"{name}/{number}{f'.{place}' if place else ''}"))
        if rewrite.has("question"):
            probes.append(Probe(rewrite.text("question"), (edits[-1].target_new,), "generalization", "question"))
    if not edits:
        record.refuse("requested_rewrite", "expected at least one edit; got an empty list: add one")
    answers = _answers(record, "new_answer")
    probes += [Probe(question, answers, "portability", "multi_hop") for question in record.texts("questions")]
    changed = {probe.prompt for probe in probes}
    for hop in record.records("new_single_hops") if record.has("new_single_hops") else ():
        if (question := hop.text("question")) not in changed:
            probes.append(Probe(question, _answers(hop, "answer"), "locality", "single_hop"))
    return Case(edits[0], tuple(probes), tuple(edits[1:]))


def _edit(rewrite: Record, id: str) -> Edit:
    return rewrite.edit(
        rewrite.text("prompt"),
        subject=rewrite.text("subject"),
        target_new=rewrite.record("target_new").text("str"),
        target_true=rewrite.record("target_true").text("str") if rewrite.has("target_true") else None,
        id=id,
    )


def _answers(record: Record, field: str) -> tuple[str, ...]:
    aliases = record.texts(f"{field}_alias") if record.has(f"{field}_alias") else ()
    return tuple(dict.fromkeys((record.text(field), *aliases)))
