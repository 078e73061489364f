"""Edits whose answer is a paragraph: AKEW (Wu et al. 2024, arXiv 2402.18909) and EditEverything (Jiang et al. 2025,
AnyEdit, arXiv 2502.05628). No sample is bundled; UnKE stands in `unke`.

`with_other_texts` gives all of them what must stay as it was, after UnKEBench-Loc (Xiong et al. 2025, arXiv
2506.09672), whose own texts are not public: a question of another record that is alike, a document, and a fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reknow.datasets.facts import load_facts
from reknow.datasets.records import Record
from reknow.datasets.text import sample_text
from reknow.edits import Case, Probe
from reknow.texts.writing import words

_SENTENCES = 5
"""How many statements of an answer are asked for, the first ones, as in the scripts of AnyEdit and EasyEdit."""


_BEGINNING, _CONTINUED = 20, 40
"""Words of a document that are shown, and words behind them that are asked for."""


def with_other_texts(cases: Sequence[Case]) -> list[Case]:
    """The cases with questions about something else, as locality.

    | probe | is | as in UnKEBench-Loc |
    |---|---|---|
    | `similar` | of the other questions the one with the most words in common, with its answer | relevant documents |
    | `document` | how a paragraph of the bundled WikiText goes on | random documents |
    | `fact` | a fact of known_1000 | facts of KnowEdit |

    The model need not know the answers: whether it says of them what it did is what counts.
    """
    documents = [text.split() for text in sample_text()]
    documents = [text for text in documents if len(text) >= _BEGINNING + _CONTINUED]
    facts, asked = load_facts("known_1000"), [set(words(case.edit.text)) for case in cases]
    found = []
    for i, case in enumerate(cases):
        document, fact = documents[i % len(documents)], facts[i % len(facts)]
        begun, goes_on = document[:_BEGINNING], document[_BEGINNING : _BEGINNING + _CONTINUED]
        probes = [
            Probe(" ".join(begun), (" ".join(goes_on),), "locality", "document"),
            Probe(fact.text, (fact.answer,), "locality", "fact"),
        ]
        others = [j for j, other in enumerate(cases) if other.edit.text != case.edit.text]
        if others:
            near = max(others, key=lambda j: len(asked[i] & asked[j]) / len(asked[i] | asked[j]))
            edit = cases[near].edit
            probes.append(Probe(edit.text, (edit.target_new,), "locality", "similar", separator=edit.separator))
        found.append(replace(case, probes=(*case.probes, *probes)))
    return found


def read_everything(name: str, record: Record) -> Case:
    """A record of `editevery.json`: `question` and `answer`, in prose, mathematics, code, poems and news.

    It has no other questions, so what is scored is how much of the answer is written. `category` is not used.
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
