"""Facts that a model may already know, for causal tracing and for finding the layer to edit.

known_1000 (Meng et al. 2022), ParaRel (Elazar et al. 2021, facts of T-REx), LRE (Hernandez et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from reknow.datasets.reading import Record, place_subject
from reknow.errors import InputError
from reknow.texts.templates import fill, split_template


@dataclass(frozen=True)
class Fact:
    """A true statement: `Fact("{} is located in the continent of", "Vinson Massif", "Antarctica")`.

    Raises:
        InputError: a field is empty, or the prompt does not hold exactly one `{}`.
    """

    prompt: str
    subject: str
    answer: str
    wordings: tuple[str, ...] = ()
    """Other prompts with `{}` for the same question, where the data set has some."""

    def __post_init__(self):
        if len(split_template(self.prompt)) != 2 or not (self.subject.strip() and self.answer.strip()):
            raise InputError(
                f"expected a prompt with one {{}}, a subject and an answer; got {self}: fill in the missing"
            )

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return fill(self.prompt, self.subject)


def read_known(record: Record) -> list[Fact]:
    """A record of `known_1000.json`, which holds 1,209 facts that GPT-2 XL knows.

    `prompt` is the traced text. `template` is not used: in 478 records it stops short of the words that
    GPT-2 XL itself wrote before the answer, so the answer is not what follows it.
    """
    prompt, subject = place_subject(record.text("prompt"), record.text("subject"))
    if subject is None:
        record.refuse("subject", f"expected it in {prompt!r}; got {record.text('subject')!r}: correct one of them")
    return [Fact(prompt, subject, record.text("attribute"))]


def read_pararel(record: Record) -> list[Fact]:
    """A relation: `patterns` with [X] and [Y], `facts` with T-REx's `sub_label` and `obj_label`.

    Each fact is asked in the first pattern that ends in its object, and the other such patterns are its other
    wordings; a relation without any gives no facts.
    """
    patterns = [pattern.rstrip(" .") for pattern in record.texts("patterns")]
    ending = [p.removesuffix("[Y]").strip() for p in patterns if p.endswith(" [Y]") and p.count("[X]") == 1]
    prompts = list(dict.fromkeys(p.replace("[X]", "{}") for p in ending))
    return [
        Fact(prompts[0], fact.text("sub_label"), fact.text("obj_label"), tuple(prompts[1:]))
        for fact in record.records("facts")
        if prompts
    ]


def read_relation(record: Record) -> list[Fact]:
    """A relation file of LRE: `samples` of `subject` and `object` in the first of its `prompt_templates`."""
    return [
        Fact(prompt, pair.text("subject"), pair.text("object"))
        for prompt in record.texts("prompt_templates")[:1]
        for pair in record.records("samples")
    ]
