"""The table of data sets, and how the form of a file is known by its fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from reknow.datasets import (
    cknowedit,
    convsent,
    counterfact,
    easyedit,
    fastedit,
    halluedit,
    knowedit,
    long_answers,
    mquake,
    own,
    ripple,
    unke,
    wikibigedit,
    zsre,
)
from reknow.datasets.records import Record
from reknow.edits import Case


class CaseSource(NamedTuple):
    """A bundled sample, and how one record of the published form becomes a case (None: unusable record)."""

    sample: str | None
    """None: its licence lets nobody pass it on, or it is a user's own, so a file has to be given."""
    read: Callable[[str, Record], Case | None]
    licence: str
    source: str
    """Where the files are; `hub:` for `--data NAME:hub:…`."""
    link: Callable[[Sequence[Case]], list[Case]] = list
    """What the cases take from each other, once all of the file are read."""


_KNOWEDIT = "Apache-2.0", "hub:zjunlp/KnowEdit"
_EASYEDIT = "MIT", "github.com/zjunlp/EasyEdit"
_ANYEDIT = "none stated", "github.com/jianghoucheng/AnyEdit", long_answers.with_other_texts
_OWN = "yours", "your file"

DATASETS: dict[str, CaseSource] = {
    "counterfact": CaseSource("counterfact.jsonl", counterfact.read_case, "MIT", "github.com/kmeng01/rome"),
    "counterfact-easyedit": CaseSource("counterfact_easyedit.jsonl", easyedit.read_case, *_EASYEDIT),
    "zsre": CaseSource("zsre.jsonl", zsre.read_case, "Apache-2.0", "github.com/eric-mitchell/mend"),
    "knowedit-zsre": CaseSource("knowedit_zsre.jsonl", knowedit.read_case, *_KNOWEDIT),
    "wiki_recent": CaseSource("wiki_recent.jsonl", knowedit.read_case, *_KNOWEDIT),
    "wiki_counterfact": CaseSource("wiki_counterfact.jsonl", knowedit.read_case, *_KNOWEDIT),
    "wikibio": CaseSource("wikibio.jsonl", knowedit.read_case, *_KNOWEDIT),
    "qaedit": CaseSource("qaedit.jsonl", zsre.read_qaedit_case, "Apache-2.0", "arXiv 2502.11177"),
    "convsent": CaseSource(
        "convsent.jsonl",
        convsent.read_case,
        "CC BY 4.0",
        "github.com/eric-mitchell/serac",
        convsent.with_other_topics,
    ),
    "ripple": CaseSource(None, ripple.read_case, "MIT", "github.com/edenbiran/RippleEdits"),
    "halluedit": CaseSource(None, halluedit.read_case, "MIT", "hub:llm-editing/HalluEditBench"),
    "wikibigedit": CaseSource(None, wikibigedit.read_case, "Apache-2.0", "hub:lukasthede/WikiBigEdit"),
    "wise": CaseSource(None, easyedit.read_case, *_EASYEDIT),
    "mquake": CaseSource(None, mquake.read_case, "none stated", "github.com/princeton-nlp/MQuAKE"),
    "unke": CaseSource(
        None, unke.read_case, "none stated", "github.com/TrustedLLM/UnKE", long_answers.with_other_texts
    ),
    "akew": CaseSource(None, long_answers.read_akew, *_ANYEDIT),
    "editeverything": CaseSource(None, long_answers.read_everything, *_ANYEDIT),
    "cknowedit": CaseSource(None, cknowedit.read_case, "see its card", "hub:zjunlp/CKnowEdit"),
    "knowedit": CaseSource(None, knowedit.read_case, *_KNOWEDIT),
    "easyedit": CaseSource(None, easyedit.read_case, *_OWN),
    "fastedit": CaseSource(None, fastedit.read_case, *_OWN),
    "own": CaseSource(None, own.read_case, *_OWN),
}

_FIELDS: dict[str, set[str]] = {
    "ripple": {"edit", "Logical_Generalization"},
    "halluedit": {"question", "object", "paraphrased_question"},
    "wikibigedit": {"tag", "mhop", "loc"},
    "mquake": {"requested_rewrite", "questions", "new_answer"},
    "counterfact": {"requested_rewrite"},
    "zsre": {"src", "alt"},
    "unke": {"question", "para_question", "answer"},
    "editeverything": {"question", "answer", "category"},
    "convsent": {"ent", "pos", "neg"},
    "wikibio": {"text", "labels", "concept"},
    "qaedit": {"prompt", "target", "rephrase", "locality"},
    "fastedit": {"prompt", "target"},
    "cknowedit": {"prompt", "target_new", "target_old"},
}
"""Fields that only a file of this form has, or of a later one in this table."""


def form_of(records: Sequence[Record]) -> str | None:
    """The row of `DATASETS` that reads such records, by the fields that they have together; None: no row does."""
    fields = {name: value for record in reversed(records) for name, value in record.fields.items()}
    for form, marks in _FIELDS.items():
        if marks <= fields.keys():
            return form
    named = fields.keys() | {column for record in records for column in record.empty}
    if "target_new" not in named or not {"prompt", "prompts"} & named:
        return None
    grouped = any(isinstance(fields.get(kind), dict) for kind in own.QUESTIONS)
    if grouped and "subject" in fields:
        return "knowedit"
    return "easyedit" if grouped or easyedit.MARKS & fields.keys() else "own"
