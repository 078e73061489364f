"""CounterFact (Meng et al. 2022, arXiv 2202.05262), in the authors' form."""

from __future__ import annotations

from reknow.datasets.records import Record
from reknow.edits import Case, Probe


def read_case(name: str, record: Record) -> Case:
    """A record of the authors' `counterfact.json`.

    | field | becomes |
    |---|---|
    | `paraphrase_prompts` (2) | generalization `paraphrase`, answer `target_new` |
    | `neighborhood_prompts` (10) | locality `neighborhood`, answer `target_true` |
    | `generation_prompts` (10, repeated on purpose: each is sampled once) | fluency `generation` |
    | `attribute_prompts` | nothing: subjects whose answer is `target_new`; in no published score |
    """
    rewrite = record.record("requested_rewrite")
    new = rewrite.record("target_new").text("str")
    true = rewrite.record("target_true").text("str")
    edit = rewrite.edit(
        rewrite.text("prompt"),
        subject=rewrite.text("subject"),
        target_new=new,
        target_true=true,
        id=f"{name}/{record.fields.get('case_id', record.index)}",
    )
    probes = (
        *(Probe(text, (new,), "generalization", "paraphrase") for text in record.texts("paraphrase_prompts")),
        *(Probe(text, (true,), "locality", "neighborhood") for text in record.texts("neighborhood_prompts")),
        *(Probe(text, (), "fluency", "generation") for text in record.texts("generation_prompts")),
    )
    return Case(edit, probes)
