"""KnowEdit (Zhang et al. 2024, arXiv 2401.01286): ZsRE, wiki_recent, wiki_counterfact and WikiBio."""

from __future__ import annotations

import logging

from reknow.datasets.reading import Record, place_subject
from reknow.edits import Case, Kind, Probe

logger = logging.getLogger(__name__)


def read_case(name: str, record: Record) -> Case:
    """A record of any of the four sets.

    | field | becomes |
    |---|---|
    | `prompt`, `subject`, `target_new` | the edit; of a list of targets the first |
    | `text`, `concept`, `labels` (WikiBio) | the same: passage so far, entity, next sentence |
    | `ground_truth` | `target_true`, the first; wiki_recent and WikiBio have none |
    | `rephrase_prompt` or `rephrase` | generalization `rephrase` |
    | `locality`, `portability` | probes of that kind under the set's own names (`Relation_Specificity` …) |

    The model also writes on behind the request (fluency `request`), as the tables' own script lets it.
    An answer may be a text, a list, or a list of alias lists: all become accepted answers, in the file's
    order. Questions without any answer are left out (3 in wiki_recent, 2 in wiki_counterfact), logged.
    """
    biography = "text" in record.fields
    request = _first(record, "text" if biography else "prompt")
    target = _first(record, "labels" if biography else "target_new")
    prompt, subject = place_subject(request, record.text("concept" if biography else "subject"))
    edit = record.edit(
        prompt,
        subject=subject,
        target_new=target,
        target_true=next(iter(_optional(record, "ground_truth")), None),
        id=f"{name}/{record.index}",
    )
    rewordings = _optional(record, "rephrase_prompt") + _optional(record, "rephrase")
    probes = [Probe(text, (target,), "generalization", "rephrase") for text in rewordings]
    for kind in ("locality", "portability"):
        if record.fields.get(kind):
            probes += _group_probes(kind, record.record(kind))
    probes.append(Probe(edit.text, (), "fluency", "request"))
    return Case(edit, tuple(probes))


def _group_probes(kind: Kind, groups: Record) -> list[Probe]:
    """The probes of `{"Relation_Specificity": [{"prompt": …, "ground_truth": …}, …], …}`."""
    probes = []
    for name in groups.fields:
        for item in groups.records(name):
            answers = tuple(dict.fromkeys(item.texts("ground_truth")))
            if answers:
                probes.append(Probe(_first(item, "prompt"), answers, kind, name))
            else:
                logger.info("%s: %s left out, it has no answer", item.where, item.prefix.rstrip("."))
    return probes


def _first(record: Record, field: str) -> str:
    """The text of a field, or the first of its list of texts."""
    texts = record.texts(field)
    return texts[0] if texts else record.text(field)  # text() says what is wrong with a blank one


def _optional(record: Record, field: str) -> tuple[str, ...]:
    return record.texts(field) if record.fields.get(field) else ()
