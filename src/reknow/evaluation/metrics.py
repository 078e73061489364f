"""What each number means: pure functions from readings to values.

A `Reading` is what a model answered to one probe. A metric's key is `name@protocol`; the protocol says
how the answer was read, because the same edit scores very differently under each (arXiv 2502.11177):

* `teacher_forced_tokens`: share of the answer's tokens that are the most likely next token after the
  prompt and the *right* tokens before it (what EasyEdit prints as accuracy);
* `teacher_forced_exact`: 1 if all of them are (MEND, SERAC, MEMIT's `*_correct`);
* `generated`: 1 if the greedy continuation of the bare prompt begins with an accepted answer;
* `contrast`: the new answer is more (on neighbours: less) likely than the old one (CounterFact);
* `likelihood`, `divergence`: how likely texts of a sentiment are, and how far the model moved (ConvSent);
* `sampled`: measured on text that the model writes; `side`: on given text and weights; `edit`: on the edit itself;
* `written`: the greedy continuation against a long answer, word by word;
* `match`: the greedy continuation against the accepted answers in other ways than `generated`, see `matching`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress

from reknow.errors import MissingExtra
from reknow.evaluation.convsent import sentiment_metrics
from reknow.evaluation.long_text import bleu, rouge, token_f1
from reknow.evaluation.matching import MATCHES, answer_words, generated
from reknow.evaluation.readings import Reading
from reknow.model.scoring import NO_TOKEN
from reknow.texts.writing import pieces, words

PROTOCOLS = ("teacher_forced_tokens", "teacher_forced_exact", "generated")
"""The ways to read whether an answer is right; their numbers are never averaged with each other."""

_CONTRAST = {"reliability": ("ES", "EM"), "generalization": ("PS", "PM"), "locality": ("NS", "NM")}
_ASKED = ("reliability", "generalization", "portability", "reversal", "instructed")
_OF_WRITTEN = ("token_f1", "bleu", "rouge_", "exact@", "normalised@", "contains@")
_SUCCESS = (*_ASKED, "ES@", "PS@", "sentiment@", *_OF_WRITTEN, "paraphrase_")
LONG_ANSWER = 10
"""Words from which on an answer is also compared word by word."""

_OPENING_QUOTE = re.compile(r"(?<![^\s(\[{<])\"")
_TREEBANK_WORD = re.compile(
    r"\d+(?:[.,:/]\d+)*|\w+(?=n['’]t\b)|n['’]t\b|['’](?:s|m|d|ll|re|ve)\b"
    r"|(?:\w\.){2,}|\w+(?:[-./]\w+)*|\.\.\.|--|``|''|[^\w\s]",
    re.IGNORECASE,
)


# ---- is the answer right?


def teacher_forced_tokens(hits: Sequence[bool]) -> float:
    """Share of the answer's tokens that are the argmax: 3 of 4 is 0.75 (EasyEdit `test_prediction_acc`)."""
    return sum(hits) / len(hits)


def teacher_forced_exact(hits: Sequence[bool]) -> float:
    """1.0 if every token of the answer is the argmax, else 0.0 (MEND, SERAC; MEMIT `*_prompts_correct`)."""
    return float(all(hits))


# ---- is it as before?


def unchanged(before: Sequence[int], after: Sequence[int]) -> list[bool]:
    """Per position: is the argmax the one from before the edit? Right or wrong is not asked (EasyEdit locality).

    `teacher_forced_tokens` and `teacher_forced_exact` turn it into a score. Where either says nothing (`NO_TOKEN`,
    its logits are no numbers) it is not.
    """
    return [then == now != NO_TOKEN for then, now in zip(before, after, strict=True)]


def unchanged_generated(before: str, after: str, answers: Sequence[str]) -> float:
    """1.0 if both continuations begin with the same words, as many as the longest accepted answer has."""
    count = max(1, *(len(answer_words(answer, articles=True)) for answer in answers))
    return float(answer_words(before, articles=True)[:count] == answer_words(after, articles=True)[:count])


# ---- CounterFact


def _contrast(kind: str, nll_new: float, nll_true: float) -> dict[str, float]:
    """CounterFact scores of one prompt (Meng et al. 2022, `eval_utils_counterfact.py`, `summarize.py`).

    From the mean NLL per token of the two targets: success is 1 if the wanted one is strictly more likely,
    magnitude is the difference of e^(-nll). Wanted is the new target on the request (ES, EM) and its
    paraphrases (PS, PM), the true one on neighbours (NS, NM).
    """
    success, magnitude = _CONTRAST[kind]
    wanted, other = (nll_true, nll_new) if kind == "locality" else (nll_new, nll_true)
    return {
        f"{success}@contrast": float(wanted < other),
        f"{magnitude}@contrast": math.exp(-wanted) - math.exp(-other),
    }


def harmonic_mean(values: Iterable[float]) -> float:
    """Harmonic mean, 0 if a value is 0; of ES, PS and NS, each over all cases, it is the score S of ROME."""
    values = list(values)
    return len(values) / sum(1 / value for value in values) if all(value > 0 for value in values) else 0.0


# ---- written text


def text_words(text: str) -> list[str]:
    """Words and punctuation marks in the manner of the Penn Treebank, case kept; characters where no spaces are.

    The published entropies use `nltk.word_tokenize`; this is one regular expression without nltk's
    sentence model, so their last digits may differ.
    """
    text = _OPENING_QUOTE.sub("``", text).replace('"', "''")
    # The regular expression would take a mark on a letter, as in Hindi, for the end of a word.
    solid = "".join("x" if unicodedata.category(character)[0] == "M" else character for character in text)
    return [piece for found in _TREEBANK_WORD.finditer(solid) for piece in pieces(text[slice(*found.span())])]


def ngram_entropy(text: str) -> float:
    """Fluency: weighted mean of bigram and trigram entropy, in bits (papers print it times 100).

    H_n = -Σ f log2 f over the relative frequencies f of word n-grams; the value is (2/3·H_2 + 4/3·H_3) / 2
    (Zhang et al. 2018; ROME `compute_n_gram_entropy`). Repetitive text has a low value.
    """
    words = text_words(text)
    bigrams, trigrams = ([tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for n in (2, 3))
    return (2 / 3 * _entropy(bigrams) + 4 / 3 * _entropy(trigrams)) / 2


def _entropy(items: Sequence) -> float:
    shares = [count / len(items) for count in Counter(items).values()]
    return sum(share * math.log2(1 / share) for share in shares)


# ---- one case


def case_metrics(
    after: Sequence[Reading], before: Sequence[Reading] | None = None, failed: bool = False
) -> dict[str, float]:
    """Metrics of one case: key → mean over the probes that have it; without probes absent, never 0.

    `before` holds the same probes read on the unedited model; without it nothing is said about locality.
    A kind with several probe names also has `kind:name@protocol`. With `failed` the edit was not made:
    its success counts as 0, whatever the unedited model happens to answer.
    """
    values = defaultdict(list)
    names = defaultdict(set)
    earlier = [None] * len(after) if before is None else before
    for now, then in zip(after, earlier, strict=True):
        names[now.kind].add(now.name)
        for key, value in _probe_metrics(now, then).items():
            values[key].append(value)
    means = {
        key: sum(found) / len(found)
        for key, found in values.items()
        if ":" not in key or len(names[key.partition(":")[0]]) > 1
    }
    means |= sentiment_metrics(after, before)
    logs = [now.nll for now in after if now.kind == "fluency" and now.nll is not None]
    if logs:
        means["perplexity@sampled"] = math.exp(sum(logs) / len(logs))
    return {key: 0.0 if failed and key.startswith(_SUCCESS) else value for key, value in means.items()}


def _probe_metrics(now: Reading, then: Reading | None) -> dict[str, float]:
    if now.kind == "fluency":
        if now.text is None:
            return {}
        ratio = {} if now.ppl_r is None else {"PPL_r@sampled": now.ppl_r}
        return {"fluency@sampled": ngram_entropy(now.prompt + now.text), **ratio}
    if now.kind == "sentiment":  # its texts only count together
        return {}
    found = _overlaps(now) | _matches(now)
    scores = _scores(now.hits, None if now.text is None else generated(now.text, now.answers))
    if now.kind == "locality":
        found = {f"locality_correct@{protocol}": value for protocol, value in scores.items()}
        scores = {}
        if then is not None:
            texts = (then.text, now.text)
            same = None if None in texts else unchanged_generated(then.text or "", now.text or "", now.answers)
            scores = _scores(unchanged(then.top, now.top), same)
    if now.kind == "negation":  # the answer must not follow
        scores = {protocol: 1.0 - value for protocol, value in scores.items()}
    for protocol, value in scores.items():
        found[f"{now.kind}@{protocol}"] = found[f"{now.kind}:{now.name}@{protocol}"] = value
    if now.nll_new is not None and now.nll_true is not None:
        found |= _contrast(now.kind, now.nll_new, now.nll_true)
    return found


def _matches(now: Reading) -> dict[str, float]:
    """Whether an accepted answer is what the model wrote, to the request and to its paraphrases, in each way."""
    start = {"reliability": "", "generalization": "paraphrase_"}.get(now.kind)
    if start is None or now.text is None:
        return {}
    ways = [name for name in MATCHES if name != "generated"]
    return {f"{start}{name}@match": MATCHES[name](now.text, now.answers) for name in ways}


def _overlaps(now: Reading) -> dict[str, float]:
    """How much of a long answer the model writes, to the request and to its paraphrases."""
    start = {"reliability": "", "generalization": "paraphrase_"}.get(now.kind)
    if start is None or now.text is None or len(words(now.answers[0])) < LONG_ANSWER:
        return {}
    scores = [{"token_f1": token_f1(now.text, answer), "bleu": bleu(now.text, answer)} for answer in now.answers]
    with suppress(MissingExtra):
        scores = [own | rouge(now.text, answer) for own, answer in zip(scores, now.answers, strict=True)]
    return {f"{start}{name}@written": max(own[name] for own in scores) for name in scores[0]}


def _scores(hits: Sequence[bool], written: float | None) -> dict[str, float]:
    """The score under each protocol; none for what was not written."""
    values = (teacher_forced_tokens(hits), teacher_forced_exact(hits), written)
    return {protocol: value for protocol, value in zip(PROTOCOLS, values, strict=True) if value is not None}
