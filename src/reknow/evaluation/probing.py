"""Asks a model the probes of cases: forward passes and generation over many cases at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from reknow.edits import Case, Edit, Probe
from reknow.errors import TextRefused
from reknow.evaluation.convsent import OTHER_TOPIC
from reknow.evaluation.long_text import written_ratio
from reknow.evaluation.readings import Reading, finite_nats
from reknow.lm import LM
from reknow.model.readable import in_context_questions, scored_answers
from reknow.model.scored_tokens import ScoredTokens, predictions
from reknow.model.scoring import kl_divergence
from reknow.model.tokens import EncodedText, Text
from reknow.patching.patches import Patch

SAMPLED_TOKENS, SAMPLED_TOP_K = 100, 5
"""Length, prompt included, and top-k of the text that fluency is measured on (ROME, EasyEdit)."""

_GREEDY_TOKENS, _GREEDY_SLACK = 8, 4
"""A continuation is at least this long, and this much longer than the answer: room for "the", a dash …"""

_TEXTS_PER_PASS = 64
"""Texts whose distributions over the vocabulary are held at once."""


def read_cases(
    lm: LM,
    cases: Sequence[Case],
    *,
    fluency: bool = True,
    generate: bool = True,
    seed: int = 0,
    in_context: bool = False,
    written: Sequence[str] | None = None,
) -> list[list[Reading]]:
    """What the model, as it is now, answers to all questions of each case, in their order.

    Args:
        fluency: off, the probes of that kind get no text.
        generate: off, the others do not.
        seed: for the sampling alone.
        in_context: put the edit as a statement in front of every question.
        written: the texts of the probes for fluency, where they are there already.
    """
    asked = [pair for case in cases for pair in (in_context_questions(case) if in_context else case.asked)]
    questions = [pair for pair in asked if pair[1].kind != "fluency"]
    prompts = [probe.prompt for _, probe in asked if probe.kind == "fluency"]
    answers = iter(_answered(lm, questions, generate))
    texts = iter(written or _sampled(lm, prompts, seed) if fluency else [None] * len(prompts))
    readings = (
        Reading(probe.kind, probe.name, probe.prompt, probe.answers, text=next(texts))
        if probe.kind == "fluency"
        else next(answers)
        for _, probe in asked
    )
    return [[next(readings) for _ in case.questions] for case in cases]


def read_compared(
    lm: LM,
    cases: Sequence[Case],
    stack_before: tuple[Patch, ...],
    *,
    fluency: bool,
    generate: bool,
    seed: int,
    in_context: bool,
    written: Sequence[str] | None = None,
) -> list[list[Reading] | str]:
    """`read_cases`, compared with what the model says with the patches `stack_before` alone.

    A case that it cannot read as it is now, since a memory puts texts in front of the questions, has the reason.
    """

    def answers(some: Sequence[Case]) -> list[list[Reading]]:
        asked = {"fluency": fluency, "generate": generate, "seed": seed, "in_context": in_context}
        readings = read_cases(lm, some, **asked, written=written if some is cases else None)
        if lm.patches != stack_before:
            readings = _with_divergence(lm, readings, stack_before)
        if any(one.kind == "fluency" and one.text for case in readings for one in case):
            with lm.stacked(stack_before):
                readings = _with_perplexity(lm, some, readings)
        return readings

    try:
        return [*answers(cases)]
    except TextRefused:
        found: list[list[Reading] | str] = []
        for case in cases:
            try:
                found += answers([case])
            except TextRefused as error:
                found.append(str(error))
        return found


def _with_perplexity(lm: LM, cases: Sequence[Case], readings: Sequence[Sequence[Reading]]) -> list[list[Reading]]:
    """The readings with the likelihood of every sampled text under the model as it is now, and with PPL_r of those
    that stand behind the request itself."""

    def judged(edit: Edit, reading: Reading) -> Reading:
        if reading.kind != "fluency" or not reading.text:
            return reading
        nll = math.log(perplexity(lm, [reading.prompt.rstrip(" ") + reading.text]))
        if reading.prompt != edit.text:
            return replace(reading, nll=nll)
        ratio = written_ratio(lm, reading.prompt, edit.target_new, reading.text, edit.separator)
        return replace(reading, nll=nll, ppl_r=None if math.isnan(ratio) else ratio)

    return [[judged(case.edit, one) for one in found] for case, found in zip(cases, readings, strict=True)]


@torch.no_grad()
def _with_divergence(
    lm: LM, readings: Sequence[Sequence[Reading]], stack_before: tuple[Patch, ...]
) -> list[list[Reading]]:
    """The readings of ConvSent's other topics with KL(before ‖ the model as it is now) over the answer's tokens."""
    asked = {(r.prompt, r.answers[0]) for case in readings for r in case if r.name == OTHER_TOPIC}
    rows = lm.encode([Text(*pair) for pair in sorted(asked)])
    found: dict[tuple[str, str], float] = {}
    for start in range(0, len(rows), _TEXTS_PER_PASS):
        part = rows[start : start + _TEXTS_PER_PASS]
        scored = ScoredTokens(lm, part, [predictions(row, row.prompt_length) for row in part], None)
        now = scored.log_probs()
        with lm.stacked(stack_before):
            before = scored.log_probs()
        divergence = kl_divergence(before, now)  # (tokens,)
        means = [divergence[scored.of_row == i].mean().item() for i in range(len(part))]
        found |= dict(zip(sorted(asked)[start:], map(finite_nats, means), strict=False))
    return [
        [replace(r, divergence=found[r.prompt, r.answers[0]]) if r.name == OTHER_TOPIC else r for r in case]
        for case in readings
    ]


def perplexity(lm: LM, texts: Sequence[str]) -> float:
    """`lm.perplexity`, kept finite."""
    return math.exp(finite_nats(math.log(lm.perplexity(texts))))


def _answered(lm: LM, questions: Sequence[tuple[Edit, Probe]], generate: bool) -> list[Reading]:
    asked = [
        (probe.prompt, answer, probe.separator) for edit, probe in questions for answer in scored_answers(edit, probe)
    ]
    scores = iter(lm.score(*map(list, zip(*asked, strict=True))) if asked else [])
    written = [generate and probe.kind != "sentiment" for _, probe in questions]  # of a given text nothing is asked
    texts = iter(_greedy(lm, [probe for (_, probe), wanted in zip(questions, written, strict=True) if wanted]))
    readings = []
    for (edit, probe), wanted in zip(questions, written, strict=True):
        text = next(texts) if wanted else None
        own, *both = [next(scores) for _ in scored_answers(edit, probe)]
        nll_new, nll_true = (finite_nats(score.nll) for score in both) if both else (None, None)
        read = (own.correct, own.top, finite_nats(own.nll), nll_new, nll_true, text)
        readings.append(Reading(probe.kind, probe.name, probe.prompt, probe.answers, *read))
    return readings


def _greedy(lm: LM, probes: Sequence[Probe]) -> list[str]:
    """Greedy continuations; prompts whose answers are of like length run together, each prompt once."""
    lengths: dict[int, dict[str, str]] = {}
    places = []
    for probe, row in zip(probes, lm.encode([Text(probe.prompt) for probe in probes]), strict=True):
        tokens = max(len(ids) for ids in lm.tokenizer(list(probe.answers))["input_ids"]) + _GREEDY_SLACK
        length = max(_GREEDY_TOKENS, 2 ** math.ceil(math.log2(tokens)))
        if lm.max_tokens is not None:  # a long answer is read as far as the model has positions
            length = max(1, min(length, lm.max_tokens + 1 - len(row.ids)))
        lengths.setdefault(length, {})[probe.prompt] = ""
        places.append((length, probe.prompt))
    for length, found in lengths.items():
        found.update(zip(found, lm.generate(list(found), length), strict=True))
    return [lengths[length][prompt] for length, prompt in places]


def _sampled(lm: LM, prompts: Sequence[str], seed: int) -> list[str]:
    """Sampled continuations, so that prompt and continuation have SAMPLED_TOKENS tokens together."""
    if not prompts:
        return []
    rooms, most = text_rooms(lm, lm.encode([Text(prompt) for prompt in prompts]))
    return cut_texts(lm, lm.generate(list(prompts), most, top_k=SAMPLED_TOP_K, seed=seed), rooms)


def text_rooms(lm: LM, rows: Sequence[EncodedText]) -> tuple[list[int], int]:
    """How many tokens of text are read behind each prompt, and how many are written behind all of them."""
    lengths = [len(row.ids) for row in rows]
    rooms = [max(1, SAMPLED_TOKENS - length) for length in lengths]
    limit = max(rooms) if lm.max_tokens is None else max(1, lm.max_tokens + 1 - max(lengths))
    return rooms, min(max(rooms), limit)


def cut_texts(lm: LM, texts: Sequence[str], rooms: Sequence[int]) -> list[str]:
    """The texts, each cut at so many tokens."""
    spans = lm.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        text if len(places) <= room else text[: places[room - 1][1]]
        for text, places, room in zip(texts, spans, rooms, strict=True)
    ]
