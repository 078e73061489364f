"""RippleEdits (Cohen et al. 2023, arXiv 2307.12976): what follows from an edit, by six criteria. No sample is
bundled."""

from __future__ import annotations

import re
from itertools import takewhile

from reknow.datasets.records import Record
from reknow.edits import Case, Kind, Probe

_CRITERIA: dict[str, tuple[Kind, str]] = {
    "Logical_Generalization": ("portability", "Logical_Generalization"),
    "Compositionality_I": ("portability", "Compositionality_I"),
    "Compositionality_II": ("portability", "Compositionality_II"),
    "Subject_Aliasing": ("portability", "Subject_Aliasing"),
    "Relation_Specificity": ("locality", "Relation_Specificity"),
    "Relation_Specifity": ("locality", "Relation_Specificity"),
    "Forgetfulness": ("locality", "Forgetfulness"),
}
"""Field → kind and name of its probes; one is spelled in two ways in the authors' repository."""
_SUBJECT = (
    r"(?P<subject>.+) (?:follows|is followed by)",
    r"The .*\b{relation}s? of (?P<subject>.+) (?:is|are)",
    r"The (?:[a-z]+ )*(?:of|in|which|children|award) (?P<subject>.+?)"
    r"(?: has| won| plays in| is (?:a member of|associated with|part of|the capital of))? (?:is|are)",
)
"""Where the subject stands in the beginning of a sentence, by the phrases of the set; the first that fits."""


def read_case(name: str, record: Record) -> Case:
    """A record of `recent.json`, `random.json` or `popular.json`.

    | field | becomes |
    |---|---|
    | `edit.prompt`, a sentence | the edit: the prompt up to the answer, and the answer |
    | `edit.previous_fact` (random, popular) | `target_true` |
    | `Logical_Generalization`, `Compositionality_I`, `Compositionality_II`, `Subject_Aliasing` | portability |
    | `Relation_Specificity`, `Forgetfulness` | locality |

    The answer's label stands in no field of its own: it is that of a question whose `target_ids` are the edit's, or
    else what follows the beginning that the sentence shares with the previous fact's. The subject's is found by the
    phrases of the set.

    Every query of a test is a probe, answered by any of its values or aliases of more than one character or a digit.
    The authors want all values of a query where there are several, count a test as passed where one of its queries is
    (OR) or all are (AND), and leave out tests whose condition queries the unedited model misses; these are
    not used here. Queries without an answer are left out.
    """
    stated = record.record("edit")
    sentence = stated.text("prompt")
    previous = stated.record("previous_fact").text("prompt") if stated.has("previous_fact") else None
    queries: list[tuple[Kind, str, Record]] = [
        (kind, label, query)
        for field, (kind, label) in _CRITERIA.items()
        for test in (record.records(field) if record.has(field) else ())
        for query in test.records("test_queries")
    ]
    beginning, target = _split(stated, sentence, previous, [query for _, _, query in queries])
    prompt = beginning
    words = re.escape(stated.text("relation").lower().replace("_", " ")) if stated.has("relation") else "$"
    for pattern in _SUBJECT:
        if found := re.fullmatch(pattern.replace("{relation}", words), beginning):
            prompt = f"{beginning[: found.start('subject')]}{{}}{beginning[found.end('subject') :]}"
            break
    else:
        found = None
    true = None
    if previous is not None and previous.startswith(beginning):
        true = previous[len(beginning) :].strip().removesuffix(".")
    edit = record.edit(
        prompt,
        subject=found and found["subject"],
        target_new=target,
        target_true=true or None,
        id=f"{name}/{record.index}",
    )
    probes = []
    for kind, label, query in queries:
        if answers := _answers(query):
            probes.append(Probe(query.text("prompt"), answers, kind, label))
        else:
            query.leave_out(query.fields.get("prompt"))
    return Case(edit, tuple(probes))


def _split(stated: Record, sentence: str, previous: str | None, queries: list[Record]) -> tuple[str, str]:
    """(the sentence up to its answer, the answer)."""
    sentence = sentence.removesuffix(".").rstrip()
    for query in queries:
        if query.fields.get("target_ids") == [stated.fields.get("target_id")]:
            for answer in query.records("answers")[:1]:
                if answer.has("value") and sentence.endswith(f" {answer.text('value')}"):
                    return sentence[: -len(answer.text("value"))].rstrip(), answer.text("value")
    pairs = zip(sentence, previous or sentence, strict=False)
    shared = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    verbs = list(re.finditer(r" (?:is followed by|is|are|follows) ", shared))
    if not verbs:
        stated.refuse("prompt", f"expected a sentence with its answer behind a verb; got {sentence!r}: correct it")
    place = verbs[-1].end()
    return sentence[:place].rstrip(), sentence[place:]


def _answers(query: Record) -> tuple[str, ...]:
    found: list[str] = []
    for answer in query.records("answers") if query.has("answers") else ():
        found += [*(answer.texts("value") if answer.has("value") else ())]
        found += [*(answer.texts("aliases") if answer.has("aliases") else ())]
    return tuple(dict.fromkeys(text for text in found if len(text) > 1 or text.isdigit()))
