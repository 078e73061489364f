"""Edits whose answer is a paragraph: AKEW (Wu et al. 2024, arXiv 2402.18909) and EditEverything (Jiang et al. 2025,
AnyEdit, arXiv 2502.05628). No sample is bundled; UnKE stands in `unke`."""

from __future__ import annotations

from reknow.datasets.records import Record
from reknow.edits import Case, Probe

_SENTENCES = 5
"""How many statements of an answer are asked for, the first ones, as in the scripts of AnyEdit and EasyEdit."""


def read_everything(name: str, record: Record) -> Case:
    """A record of `editevery.json`: `question` and `answer`, in prose, mathematics, code, poems and news.

    There are no other questions, so what is scored is how much of the answer is written. `category` is not used.
    """
    number = record.fields.get("id", record.index)
    return Case(record.edit(record.text("question"), target_new=record.text("answer"), id=f"{name}/{number}"))


def read_akew(name: str, record: Record) -> Case:
    """A record of AKEW's `CounterFact.json`, `MQuAKE-CF.json` or `WikiUpdate.json`; of several rewrites the first.

    | field of `requested_rewrite` | becomes |
    |---|---|
    | `prompt_full`, or `prompt` with `subject` and a question mark | the prompt |
    | `fact_new_uns`, a paragraph about the new fact | `target_new` |
    | `question`; in `CounterFact.json` the first of `paraphrase_prompts` | generalization `rephrase` |
    | `unsfact_triplets_GPT`, the first five | portability `sub_question`: what single sentences say |
    """
    nested = isinstance(record.fields.get("requested_rewrite"), list)
    rewrites = record.records("requested_rewrite") if nested else [record.record("requested_rewrite")]
    if not rewrites:
        record.refuse("requested_rewrite", "expected an edit; got an empty list: add one")
    rewrite = rewrites[0]
    template, subject = rewrite.text("prompt"), rewrite.text("subject")
    if "{}" not in template:
        rewrite.refuse("prompt", f"expected {{}} where the subject stands; got {template!r}: put it in")
    if not rewrite.has("prompt_full"):
        template = f"{template}?"
    answer = rewrite.text("fact_new_uns")
    number = record.fields.get("case_id", record.index)
    edit = rewrite.edit(template, subject=subject, target_new=answer, id=f"{name}/{number}")
    others = record.texts("paraphrase_prompts")[:1] if record.has("paraphrase_prompts") else ()
    if not others and rewrite.has("question"):
        others = (rewrite.text("question"),)
    probes = [Probe(other, (answer,), "generalization", "rephrase") for other in others]
    triplets = rewrite.records("unsfact_triplets_GPT") if rewrite.has("unsfact_triplets_GPT") else []
    for triplet in triplets[:_SENTENCES]:
        question = triplet.text("prompt").replace("{}", triplet.text("subject"))
        probes.append(Probe(question, (triplet.text("target"),), "portability", "sub_question"))
    return Case(edit, tuple(probes))
