"""HalluEditBench (Huang et al. 2025, arXiv 2410.16251): facts that a model got wrong. No sample is bundled."""

from __future__ import annotations

from reknow.datasets.records import Record, place_subject
from reknow.edits import Case, Probe

_HOPS = range(2, 7)


def read_case(name: str, record: Record) -> Case:
    """A row of `data/questions/hallucination_final/MODEL/TOPIC.csv`.

    | column | becomes |
    |---|---|
    | `question`, `subject`, `object` | the edit: the true answer, which that model did not give |
    | `output_MODEL` | `target_true`, what it said instead |
    | `paraphrased_question` | generalization `rephrase` |
    | `question_2hop` … `question_6hop`, with their answers | portability `2hop` … `6hop` |
    | `reversed_relation_question` | portability `reversed`, whose answer is the subject |
    | `yes_question`, `no_question` | portability `yes`, `no`, whose answers are Yes and No |
    | `multiple_choice_with_letters` behind the question | portability `multiple_choice`, whose answer is the letter |

    `locality_question` is left out: the file has no answer to it, and the authors compare the model's own before and
    after. They let a chat model judge whether an answer is right; here it is compared as all others are.
    """
    question, target = record.text("question"), record.text("object")
    prompt, subject = place_subject(question, record.text("subject"))
    said = next((field for field in record.fields if field.startswith("output_")), "")
    edit = record.edit(
        prompt,
        subject=subject,
        target_new=target,
        target_true=record.text(said) if record.has(said) else None,
        id=f"{name}/{record.index}",
    )
    asked = [(f"{n}hop", f"question_{n}hop", _text(record, f"answer_{n}hop")) for n in _HOPS]
    asked += [("reversed", "reversed_relation_question", record.text("subject"))]
    asked += [(answer.lower(), f"{answer.lower()}_question", answer) for answer in ("Yes", "No")]
    probes = [Probe(record.text("paraphrased_question"), (target,), "generalization", "rephrase")]
    probes += [
        Probe(record.text(field), (answer,), "portability", label)
        for label, field, answer in asked
        if record.has(field) and answer
    ]
    if (options := _text(record, "multiple_choice_with_letters")) and record.has("multiple_choice_labels"):
        letter = record.text("multiple_choice_labels")
        probes.append(Probe(f"{question} {options}", (letter,), "portability", "multiple_choice"))
    return Case(edit, tuple(probes))


def _text(record: Record, field: str) -> str:
    return record.text(field) if record.has(field) else ""
