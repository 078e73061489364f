"""Scores of long, free answers, where exact match alone says little: token F1, BLEU, ROUGE, similarity of embeddings,
and ICE's perplexity ratio.

UnKE's and AnyEdit's scripts take BLEU of *characters* (nltk is given strings) and ROUGE's recall, which does not mind
what a model goes on to say; `bleu(…, characters=True)` and `rouge(…, recall=True)` read as they do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean

import torch
from torch import Tensor

from reknow.errors import MissingExtra
from reknow.lm import LM
from reknow.memories.embedding import embed_texts
from reknow.model.scoring import check_logits
from reknow.model.tokens import Text
from reknow.texts.writing import words

_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
"""Our names → the library's."""


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words that answer and reference share, each as often as it occurs (SQuAD, articles kept). 0 to 1."""
    ours, theirs = words(answer), words(reference)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return _f1(shared, len(ours), len(theirs))


def bleu(answer: str, reference: str, *, characters: bool = False) -> float:
    """BLEU-4 (Papineni et al. 2002): the geometric mean of the shares of the answer's 1- to 4-grams that stand in the
    reference, times exp(1 − reference / answer) where the answer is shorter. 0 to 1; not smoothed.

    Args:
        characters: n-grams are of characters, white space and letter case as they are; of words otherwise.
    """
    ours, theirs = (list(answer), list(reference)) if characters else (words(answer), words(reference))
    logs = []
    for n in range(1, 5):
        said, wanted = (Counter(zip(*(each[i:] for i in range(n)), strict=False)) for each in (ours, theirs))
        shared = sum((said & wanted).values())
        if not shared:
            return 0.0
        logs.append(math.log(shared / said.total()))
    return math.exp(fmean(logs) + min(0.0, 1 - len(theirs) / len(ours)))


def rouge(answer: str, reference: str, *, recall: bool = False) -> dict[str, float]:
    """F1 of the words, of the pairs of words and of the longest common subsequence of words that answer and reference
    share (ROUGE-1, -2 and -L, Lin 2004), by the library `rouge-score`. `rouge_1`, `rouge_2`, `rouge_l` → 0 to 1

    Args:
        recall: which share of the reference is there, instead of F1.

    Raises:
        MissingExtra: `rouge-score` is not installed.
    """
    if not words(answer) or not words(reference):
        return dict.fromkeys(_ROUGE, float(words(answer) == words(reference)))
    scores = _scorer().score(reference, answer)
    return {name: scores[theirs].recall if recall else scores[theirs].fmeasure for name, theirs in _ROUGE.items()}


def similarity(lm: LM, answers: Sequence[str], references: Sequence[str], encoder: str | None = None) -> list[float]:
    """Cosine of the embeddings of each answer and its reference, −1 to 1: what UnKE's and AnyEdit's tables call BERT
    score.

    Args:
        encoder: folder or name of a sentence-transformers model, all-MiniLM-L6-v2 in those tables; None: the base
            model's own hidden states at the texts' last tokens, which tell much less (`memories.embedding`).
    """
    vectors = embed_texts(lm, [*answers, *references], encoder)
    return (vectors[: len(answers)] * vectors[len(answers) :]).sum(1).tolist()


class _Words:
    """Our words for the library, whose own leave out every letter beyond a to z."""

    tokenize = staticmethod(words)


@cache
def _scorer():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtra("rouge-score", "text", "ROUGE") from error
    return RougeScorer([*_ROUGE.values()], tokenizer=_Words())


def _f1(shared: int, ours: int, theirs: int) -> float:
    return 2 * shared / (ours + theirs) if ours and theirs else float(ours == theirs)


def token_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each token of a text but the first, in nats. (tokens − 1,)

    Args:
        logits: (tokens, vocabulary) of the text.
        ids: (tokens,).
    """
    return -logits[:-1].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def perplexity_ratio(statement: Sequence[float], written: Sequence[float]) -> float:
    """PPL_r: perplexity of what the edited model wrote over that of the edit itself, both under the *unedited* model.

    Args:
        statement: NLL of the tokens of prompt + new answer.
        written: NLL of the tokens that the edited model wrote behind the prompt.

    Returns:
        exp(mean(written) − mean(statement)); NaN where there is nothing to compare. Low is fluent, but a model that
        ignores the edit is fluent too: read it only where the edit succeeded.
    """
    return math.exp(fmean(written) - fmean(statement)) if written and statement else math.nan


@torch.no_grad()
def written_ratio(
    lm: LM,
    prompt: str,
    target: str,
    written: str,
    separator: str | None = None,
    nll: Callable[[Tensor, Tensor], Tensor] = token_nll,
) -> float:
    """PPL_r of one edit under the model as it is now, which has to be the *unedited* one.

    Args:
        written: what the edited model wrote behind the prompt.
        separator: between prompt and target.
        nll: gives the losses of a text's tokens by its logits, with the first token's or without.

    Returns:
        NaN where nothing was written.
    """
    if not written.strip():
        return math.nan
    rows = lm.encode([Text(prompt, target, separator=separator), Text(prompt, written, separator="")])
    losses: list[list[float]] = []
    for row in rows:
        batch, ids = lm.pad([row]), torch.tensor(row.ids, device=lm.device)
        logits = lm.forward(batch.ids, batch.mask, batch.positions, None).logits[0]
        check_logits(lm, logits)
        losses.append(nll(logits, ids).tolist())
    return perplexity_ratio(losses[0], losses[1][-len(rows[1].target_ids) :])
