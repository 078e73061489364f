"""UnKE (Deng et al. 2024, arXiv 2405.15349): questions whose answer is a paragraph. No sample is bundled."""

from __future__ import annotations

from reknow.datasets.records import Record
from reknow.edits import Case, Probe


def read_case(name: str, record: Record) -> Case:
    """A record of `final_data_v2.json`.

    | field | becomes |
    |---|---|
    | `question`, `answer` | prompt and `target_new`, about a hundred words; there is no subject |
    | `para_question` | generalization `rephrase` |
    | `sub_question`, `sub_answer` | portability `sub_question`: what single sentences of the answer say |
    """
    answer = record.text("answer")
    number = record.fields.get("id", record.index)
    edit = record.edit(record.text("question"), target_new=answer, id=f"{name}/{number}")
    questions, answers = record.texts("sub_question"), record.texts("sub_answer")
    if len(questions) != len(answers):
        record.refuse(
            "sub_answer", f"expected {len(questions)} texts, one per question; got {len(answers)}: add them"
        )
    parts = (Probe(q, (a,), "portability", "sub_question") for q, a in zip(questions, answers, strict=True))
    return Case(edit, (Probe(record.text("para_question"), (answer,), "generalization", "rephrase"), *parts))
