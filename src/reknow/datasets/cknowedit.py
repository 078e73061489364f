"""CKnowEdit (Fang et al. 2025, arXiv 2409.05806): Chinese language, facts and logic. No sample is bundled."""

from __future__ import annotations

from reknow.datasets.probes import optional_texts, pair_probes, read_probes
from reknow.datasets.records import Record
from reknow.edits import Case, Kind, Probe

_KINDS: tuple[Kind, ...] = ("locality", "portability")


def read_case(name: str, record: Record) -> Case:
    """A record of any of its ten files.

    | field | becomes |
    |---|---|
    | `prompt`, `target_new` | the edit; the prompt is its own subject, as in EasyEdit, since the set names none |
    | `target_old` | `target_true`: what a model answered before |
    | `rephrase` | generalization `rephrase` |
    | `portability`, `locality` (`prompt`, `answer`), or `…_prompt` and `…_answer` | probes of that kind |

    The authors let a chat model give marks to answers; here they are compared as all others are.
    """
    target = record.text("target_new")
    edit = record.edit(
        "{}",
        subject=record.text("prompt"),
        target_new=target,
        target_true=next(iter(optional_texts(record, "target_old")), None),
        id=f"{name}/{record.index}",
    )
    probes = [Probe(text, (target,), "generalization", "rephrase") for text in optional_texts(record, "rephrase")]
    for kind in _KINDS:
        probes += read_probes(record, kind, kind, kind)
        probes += pair_probes(record, f"{kind}_prompt", f"{kind}_answer", kind, kind)
    return Case(edit, tuple(probes))
