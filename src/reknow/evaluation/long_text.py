"""Scores of long, free answers, where exact match alone says little: token F1, ROUGE-L and ICE's perplexity ratio."""

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
from reknow.model.scoring import check_logits
from reknow.model.tokens import Text
from reknow.texts.writing import words


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words that answer and reference share, each as often as it occurs (SQuAD, articles kept). 0 to 1."""
    ours, theirs = words(answer), words(reference)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return _f1(shared, len(ours), len(theirs))


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), by the library `rouge-score`. 0 to 1.

    Raises:
        MissingExtra: `rouge-score` is not installed.
    """
    if not words(answer) or not words(reference):
        return float(words(answer) == words(reference))
    return _scorer().score(reference, answer)["rougeL"].fmeasure


class _Words:
    """Our words for the library, whose own leave out every letter beyond a to z."""

    tokenize = staticmethod(words)


@cache
def _scorer():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtra("rouge-score", "text", "ROUGE-L") from error
    return RougeScorer(["rougeL"], tokenizer=_Words())


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
