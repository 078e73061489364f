"""The table of data sets, and how the form of a file is known by its fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from reknow.datasets import cknowedit, convsent, counterfact, easyedit, fastedit, knowedit, mquake, own, unke, zsre
from reknow.datasets.reading import Record
from reknow.edits import Case


class CaseSource(NamedTuple):
    """A bundled sample, and how one record of the published form becomes a case (None: unusable record)."""

    sample: str | None
    """None: its licence lets nobody pass it on, or it is a user's own, so a file has to be given."""
    read: Callable[[str, Record], Case | None]
    link: Callable[[Sequence[Case]], list[Case]] = list
    """What the cases take from each other, once all of the file are read."""


DATASETS: dict[str, CaseSource] = {
    "counterfact": CaseSource("counterfact.jsonl", counterfact.read_case),
    "counterfact-easyedit": CaseSource("counterfact_easyedit.jsonl", easyedit.read_case),
    "zsre": CaseSource("zsre.jsonl", zsre.read_case),
    "knowedit-zsre": CaseSource("knowedit_zsre.jsonl", knowedit.read_case),
    "wiki_recent": CaseSource("wiki_recent.jsonl", knowedit.read_case),
    "wiki_counterfact": CaseSource("wiki_counterfact.jsonl", knowedit.read_case),
    "wikibio": CaseSource("wikibio.jsonl", knowedit.read_case),
    "qaedit": CaseSource("qaedit.jsonl", zsre.read_qaedit_case),
    "convsent": CaseSource("convsent.jsonl", convsent.read_case, convsent.with_other_topics),
    "unke": CaseSource(None, unke.read_case),
    "knowedit": CaseSource(None, knowedit.read_case),
    "easyedit": CaseSource(None, easyedit.read_case),
    "fastedit": CaseSource(None, fastedit.read_case),
    "mquake": CaseSource(None, mquake.read_case),
    "cknowedit": CaseSource(None, cknowedit.read_case),
    "own": CaseSource(None, own.read_case),
}

_FIELDS: dict[str, set[str]] = {
    "mquake": {"requested_rewrite", "questions", "new_answer"},
    "counterfact": {"requested_rewrite"},
    "zsre": {"src", "alt"},
    "unke": {"question", "para_question", "answer"},
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
    if "target_new" not in fields or not {"prompt", "prompts"} & fields.keys():
        return None
    grouped = any(isinstance(fields.get(kind), dict) for kind in own.QUESTIONS)
    if grouped and "subject" in fields:
        return "knowedit"
    return "easyedit" if grouped or easyedit.MARKS & fields.keys() else "own"
