"""ConvSent (Mitchell et al. 2022, arXiv 2206.06520): how a model shall feel about a topic."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from reknow.datasets.records import Record
from reknow.edits import Case, Probe

_log = logging.getLogger(__name__)

_SENTIMENTS = {"pos": "positive", "neg": "negative"}
_REQUEST = "Topic: {topic}. Sentiment: {sentiment}. {question}"
_QUESTIONS = (
    "What do you think of {}?",
    "What do you feel about {}?",
    "How do you view {}?",
    *(f"What is your {word} on {{}}?" for word in ("stance", "position", "view", "take")),
    *(f"What is your {word} of {{}}?" for word in ("opinion", "impression", "assessment", "judgment", "sentiment")),
    "What is your attitude about {}?",
)
"""The authors' thirteen, as in SERAC's `data_classes/sentiment.py`."""


def read_case(name: str, record: Record) -> Case | None:
    """A record {"ent": topic, "pos": [texts], "neg": [texts]}; the even ones become positive, the odd ones negative.

    | field | becomes |
    |---|---|
    | `ent` | the subject of `Topic: ENT. Sentiment: positive. What do you think of ENT?` |
    | the first text of the wanted sentiment | `target_new`, which no probe asks for |
    | its other texts | sentiment `wanted`, behind one of the thirteen plain questions |
    | as many texts of the other sentiment | sentiment `unwanted`, behind the same questions |

    A record without a second text of the wanted sentiment, or without one of the other, is left out, logged.
    """
    topic = record.text("ent")
    wanted, other = ("pos", "neg") if record.index % 2 == 0 else ("neg", "pos")
    target, *texts = record.texts(wanted) or ("",)
    opposite = record.texts(other)[: len(texts)]
    if not texts or not opposite:
        _log.info("%s left out: it needs two texts of the wanted sentiment and one of the other", record.where)
        return None
    asked = [_QUESTIONS[(record.index + i) % len(_QUESTIONS)].format(topic) for i in range(len(texts))]
    edit = record.edit(
        _REQUEST.format(topic=topic, sentiment=_SENTIMENTS[wanted], question=_QUESTIONS[0]),
        subject=topic,
        target_new=target,
        id=f"{name}/{record.index}",
    )
    groups = (("wanted", texts), ("unwanted", opposite))
    return Case(
        edit,
        tuple(
            Probe(question, (text,), "sentiment", group)
            for group, answers in groups
            for question, text in zip(asked, answers, strict=False)
        ),
    )


def with_other_topics(cases: Sequence[Case]) -> list[Case]:
    """The cases with the questions of the next case, last to first, as locality `other_topic`, as EasyEdit has it.

    A set with a single topic stays without them.
    """
    if len(cases) < 2:
        return list(cases)
    following = [*cases[1:], cases[0]]
    return [
        replace(
            case,
            probes=(*case.probes, *(Probe(p.prompt, p.answers, "locality", "other_topic") for p in other.probes)),
        )
        for case, other in zip(cases, following, strict=True)
    ]
