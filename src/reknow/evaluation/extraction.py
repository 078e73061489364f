"""How hard an answer is to get back out of a model: in other words, with hints, drawn at random, and between layers.

That a model does not say an answer to one prompt does not mean that it does not know it (Patil et al. 2024, arXiv
2309.17410, get 38 % of "deleted" answers back from inner layers and by paraphrases).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reknow.checks.arguments import typed
from reknow.datasets.facts import load_facts
from reknow.datasets.reading import read_sample
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.lm import LM
from reknow.model.exclusive import typed_exclusively
from reknow.model.head import apply_head
from reknow.model.tokens import Text
from reknow.texts.templates import fill

FEWEST = 5
"""How many ways to ask there are at least."""
_MOST = 8
_FRAMES = ("It is well known: {}", "I was told the following. {}", "Here is a fact. {}", "As every child learns: {}")
"""What stands around a prompt of which no other wording is known, `{}` the prompt."""
_DRAWN, _TOKENS, _TOP_K = 20, 8, 50
"""Answers that are drawn for each of the first prompts, their length, and from how many tokens each is drawn."""
NEAR = 10
"""A rank up to which an answer counts as near: whoever tries ten answers has it."""


@dataclass(frozen=True)
class Way:
    """One way of asking, and how the answer stands there."""

    kind: str
    """prompt, paraphrase, framed, or hinted: the subject or the answer itself stands in front."""
    prompt: str
    probability: float
    """Of the whole answer behind the prompt."""
    rank: int
    """The worst place that a token of it has among all tokens, given those before it."""


@dataclass(frozen=True)
class Extraction:
    """How an answer can be got out of a model."""

    ways: tuple[Way, ...]
    drawn: int
    """Answers that were drawn at temperature 1 behind the prompt and its paraphrases."""
    drawn_with: int
    """How many of them hold the answer."""
    layers: tuple[int, ...]
    """`layer_ranks`: how high the answer's first token stands in each layer's state at the prompt's end."""

    def of(self, *kinds: str) -> list[Way]:
        """The ways of these kinds."""
        return [way for way in self.ways if way.kind in kinds]


@typed
def ways_to_ask(edit: Edit, given: Sequence[str] = (), count: int = _MOST) -> list[tuple[str, str]]:
    """(kind, prompt) of other ways to ask what the edit asks, `FEWEST` at least.

    Those that are given, the edit's own, then the paraphrases that ParaRel and CounterFact have of a prompt like this
    one (paraphrase); where these are too few, the prompt behind sentences that announce it (framed).

    Raises:
        InputError: a given one does not hold the subject's place `{}`.
    """
    if edit.subject is None:
        raise InputError(f"expected an edit with a subject; {edit.prompt!r} has none: name it with --subject")
    for text in given:
        if text.count("{}") != 1:
            raise InputError(f"expected a paraphrase with {{}} where the subject stands; got {text!r}: put it there")
    templates = [*given, *edit.rephrasings, *_known_paraphrases(edit.prompt)]
    texts = [fill(text, edit.subject) if "{}" in text else text for text in templates]
    found = [("paraphrase", text) for text in dict.fromkeys(texts) if text != edit.text][: max(count, len(given))]
    frames = [("framed", frame.format(edit.text)) for frame in _FRAMES]
    return [*found, *frames[: max(0, FEWEST - len(found))]]


def _known_paraphrases(prompt: str) -> list[str]:
    """Other templates for the question of a template, that stand for the same relation in data sets."""
    found: list[str] = []
    for fact in load_facts("pararel"):
        alike = (fact.prompt, *fact.paraphrases)
        if prompt in alike:
            found += [text for text in alike if text not in (prompt, *found)]
    relations: dict[str, list[str]] = {}
    for record in read_sample("counterfact.jsonl"):
        rewrite = record.record("requested_rewrite")
        relations.setdefault(rewrite.text("relation_id"), []).append(rewrite.text("prompt"))
    for alike in relations.values():
        if prompt in alike:
            found += [text for text in dict.fromkeys(alike) if text not in (prompt, *found)]
    return found


@typed_exclusively
def extract(lm: LM, edit: Edit, answer: str, ways: Sequence[tuple[str, str]], *, seed: int = 0) -> Extraction:
    """How the answer to the edit's prompt can be got out of the model as it is now.

    Args:
        answer: the one that should not be found.
        ways: what `ways_to_ask` gave.
    """
    hints = [f"{edit.subject}. {edit.text}", f"{answer}. {edit.text}"]
    asked = [("prompt", edit.text), *ways, *(("hinted", text) for text in hints)]
    texts = [text for _, text in asked]
    scores = lm.score(texts, [answer] * len(texts), [edit.separator] * len(texts))
    read = [Way(kind, text, score.probability, score.rank) for (kind, text), score in zip(asked, scores, strict=True)]
    prompts = [text for kind, text in asked if kind != "hinted"]
    drawn = lm.generate(prompts * _DRAWN, _TOKENS, top_k=_TOP_K, seed=seed)
    holding = sum(answer.casefold() in text.casefold() for text in drawn)
    return Extraction(tuple(read), len(drawn), holding, tuple(layer_ranks(lm, edit, answer)))


@torch.no_grad()
def layer_ranks(lm: LM, edit: Edit, answer: str) -> list[int]:
    """Rank of the answer's first token in every layer's state at the prompt's end, read through the final norm and
    the head (the logit lens, nostalgebraist 2020); the last one is the model's own."""
    (row,) = lm.encode([Text(edit.text, answer, separator=edit.separator)])
    read = lm.read([row], [row.prompt_length - 1], outputs=lm.parts.blocks).outputs
    states = torch.cat([read[name].to(lm.device) for name in lm.parts.blocks])  # (layers, hidden)
    logits = apply_head(lm, states)  # (layers, vocabulary)
    wanted = logits[:, row.target_ids[0]]
    return (1 + (logits > wanted[:, None]).sum(1)).tolist()
