"""WikiBigEdit (Thede et al. 2025, arXiv 2503.05683): changes of Wikidata, month by month. No sample is bundled."""

from __future__ import annotations

from reknow.datasets.records import Record, place_subject
from reknow.edits import Case, Kind, Probe

_MANNERS = ("personas", "genv2_")
"""Beginnings of the names of questions as somebody of some character would put them."""
_OTHERS: tuple[tuple[Kind, str], ...] = (("portability", "mhop"), ("locality", "loc"))


def read_case(name: str, record: Record) -> Case:
    """A record of one of its files, as they are on the hub or as its own code writes them.

    | field | becomes |
    |---|---|
    | `update` or `src`, `ans` or `alt`, `subject` | the edit, a question and its new answer |
    | `rephrase` | generalization `rephrase` |
    | `personas` or `genv2_…` | generalization under that name: the question in another manner |
    | `mhop`, `mhop_ans`, where there are some | portability `mhop` |
    | `loc`, `loc_ans` | locality `loc` |

    `tag` (new, or an update) is not used. What pandas left blank (`null`, `NaN`) is not there.
    """
    question = record.text("update" if "update" in record.fields else "src")
    target = record.text("ans" if "ans" in record.fields else "alt")
    prompt, subject = place_subject(question, record.text("subject"))
    edit = record.edit(prompt, subject=subject, target_new=target, id=f"{name}/{record.index}")
    manners = [field for field in record.fields if field.startswith(_MANNERS)]
    probes = [
        Probe(record.text(field), (target,), "generalization", field)
        for field in ("rephrase", *manners)
        if _given(record, field)
    ]
    for kind, field in _OTHERS:
        if _given(record, field) and _given(record, f"{field}_ans"):
            probes.append(Probe(record.text(field), (record.text(f"{field}_ans"),), kind, field))
    return Case(edit, tuple(probes))


def _given(record: Record, field: str) -> bool:
    return isinstance(record.fields.get(field), str) and record.has(field)
