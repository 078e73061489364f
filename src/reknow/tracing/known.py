"""Which facts a model knows: every token of the answer is the most likely one, given those before it."""

from __future__ import annotations

from collections.abc import Sequence

from reknow.checks.arguments import typed
from reknow.datasets.facts import Fact
from reknow.edits import Case
from reknow.errors import TextRefused
from reknow.lm import LM
from reknow.model.tokens import Text


@typed
def known_facts(lm: LM, facts: Sequence[Fact]) -> list[Fact]:
    """The facts whose answer the model gives."""
    said = _says(lm, [Text(fact.text, fact.answer) for fact in facts])
    return [fact for fact, known in zip(facts, said, strict=True) if known]


@typed
def known_cases(lm: LM, cases: Sequence[Case]) -> list[Case]:
    """The cases whose old answer the model gives."""
    old = [case for case in cases if case.edit.target_true is not None]
    texts = [Text(one.edit.text, str(one.edit.target_true), separator=one.edit.separator) for one in old]
    return [case for case, known in zip(old, _says(lm, texts), strict=True) if known]


def _says(lm: LM, texts: Sequence[Text]) -> list[bool]:
    """Whether the model gives each text's target; what is too long for it, it does not."""
    readable = [text for text in dict.fromkeys(texts) if _fits(lm, text)]
    prompts, targets = [text.prompt for text in readable], [text.target for text in readable]
    scores = lm.score(prompts, targets, [text.separator for text in readable])
    said = {text for text, score in zip(readable, scores, strict=True) if score.said}
    return [text in said for text in texts]


def _fits(lm: LM, text: Text) -> bool:
    try:
        lm.check_length(lm.encode([text]))
    except TextRefused:
        return False
    return True
