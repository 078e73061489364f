"""EasyEdit (Wang et al. 2024, arXiv 2308.07269): lists of edits with the questions that examine them."""

from __future__ import annotations

from reknow.datasets.probes import first_text, optional_texts, pair_probes, read_probes
from reknow.datasets.records import Record, place_subject
from reknow.edits import Case, Kind, Probe

MARKS = frozenset(
    {"prompts", "ground_truth", "rephrase_prompt", "rephrase_prompts", "rephrase"}
    | {"locality_prompt", "locality_inputs", "portability_prompt", "portability_inputs"}
)
"""Fields by which a file is known to be of this form, beside `prompt` and `target_new`."""
_PAIRS: tuple[tuple[Kind, str], ...] = (("locality", "neighborhood"), ("portability", "one_hop"))


def read_case(name: str, record: Record) -> Case:
    """A record of EasyEdit's flat files (`counterfact-{edit,train,val}.json`, WISE's), or one place of the lists that
    its `edit()` takes as arguments.

    | field | becomes |
    |---|---|
    | `prompt` (`prompts`), `subject`, `target_new` | the edit; of a list of targets the first |
    | `ground_truth` | `target_true`, the first |
    | `rephrase_prompt` (`rephrase_prompts`, `rephrase`) | generalization `rephrase` |
    | `ood_rephrase` (WISE's temporal set) | generalization under that name |
    | `locality_prompt` and `locality_ground_truth` | locality `neighborhood` |
    | `portability_prompt` and `portability_ground_truth` | portability `one_hop` |
    | `locality_inputs`, `portability_inputs`; `locality`, `portability` | probes of that kind under their own names |

    All but the prompt and its answer may be missing; other fields are not used. In CounterFact's files the paraphrase
    is one of the authors' in about one record of six and else one of their generation prompts, whose continuation
    need not state the fact ("Danielle Darrieux was born in"), so scores on `rephrase` lie below those on
    `paraphrase` for every method.
    """
    prompt = record.text("prompts" if "prompts" in record.fields else "prompt")
    subject = record.text("subject") if record.has("subject") else None
    if subject is not None:
        prompt, subject = place_subject(prompt, subject)
    target = first_text(record, "target_new")
    edit = record.edit(
        prompt,
        subject=subject,
        target_new=target,
        target_true=next(iter(optional_texts(record, "ground_truth")), None),
        id=f"{name}/{record.fields.get('case_id', record.index)}",
    )
    paraphrases = optional_texts(record, "rephrase_prompt", "rephrase_prompts", "rephrase")
    probes = [Probe(text, (target,), "generalization", "rephrase") for text in paraphrases]
    probes += [Probe(t, (target,), "generalization", "ood_rephrase") for t in optional_texts(record, "ood_rephrase")]
    for kind, own in _PAIRS:
        probes += pair_probes(record, f"{kind}_prompt", f"{kind}_ground_truth", kind, own)
        probes += read_probes(record, f"{kind}_inputs", kind, own)
        probes += read_probes(record, kind, kind, own)
    return Case(edit, tuple(probes))
