"""KnowEdit (Zhang et al. 2024, arXiv 2401.01286): ZsRE, wiki_recent, wiki_counterfact and WikiBio."""

from __future__ import annotations

from reknow.datasets.probes import first_text, optional_texts, read_probes
from reknow.datasets.records import Record, place_subject
from reknow.edits import Case, Kind, Probe

_KINDS: tuple[Kind, ...] = ("locality", "portability")


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
    request = first_text(record, "text" if biography else "prompt")
    target = first_text(record, "labels" if biography else "target_new")
    prompt, subject = place_subject(request, record.text("concept" if biography else "subject"))
    edit = record.edit(
        prompt,
        subject=subject,
        target_new=target,
        target_true=next(iter(optional_texts(record, "ground_truth")), None),
        id=f"{name}/{record.index}",
    )
    paraphrases = optional_texts(record, "rephrase_prompt", "rephrase")
    probes = [Probe(text, (target,), "generalization", "rephrase") for text in paraphrases]
    for kind in _KINDS:
        probes += read_probes(record, kind, kind, kind)
    probes.append(Probe(edit.text, (), "fluency", "request"))
    return Case(edit, tuple(probes))
