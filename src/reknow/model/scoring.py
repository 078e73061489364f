"""How a model reads given answers and texts, teacher-forced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reknow.errors import InputError, ModelError
from reknow.model.decoder import Decoder
from reknow.model.tokens import EncodedText, Text, encode, make_batches
from reknow.progress import progress

NO_TOKEN = -1
"""In the place of a token where a model that edits have wrecked says none."""


@dataclass(frozen=True)
class Score:
    """How a model reads an answer behind a prompt, teacher-forced.

    Where patches have wrecked the model so that its logits are no numbers, every answer is wrong, `top` holds
    `NO_TOKEN` and the rank the last.
    """

    nll: float
    """Mean negative log-likelihood of the answer's tokens, in nats; NaN where logits are no numbers."""
    correct: tuple[bool, ...]
    """Per token of the answer: is it the most likely one, given the tokens before it?"""
    top: tuple[int, ...]
    """The most likely token at each of these places."""
    rank: int
    """The worst place that a token of the answer has among all tokens, given those before it."""

    @property
    def said(self) -> bool:
        """Whether the model says the answer: greedily decoded, every token of it comes."""
        return all(self.correct)

    @property
    def probability(self) -> float:
        """Of the whole answer; NaN where logits are no numbers."""
        return math.exp(-self.nll * len(self.correct))


def check_logits(lm: Decoder, logits: Tensor, asked: Tensor | None = None) -> Tensor:
    """Where logits can be read: without NaN and without infinity as the largest. (..., vocabulary) → (...)

    All that reads scores asks here. What patches have wrecked is read on, as wrong; a model without any has to be
    opened otherwise.

    Args:
        asked: which places count, where padding does not; None: all.

    Raises:
        ModelError: no patch is applied, and the model gives none.
    """
    fine = logits.amax(-1).isfinite()  # the largest of anything with NaN is NaN
    wanted = fine if asked is None else fine | ~asked
    if not (lm.patched_now) and not bool(wanted.all()):
        dtype = str(lm.dtype).removeprefix("torch.")
        raise ModelError(
            f"expected logits that are numbers; {lm.name} in {dtype} gives NaN or infinity: open it with a wider "
            "dtype, bfloat16 or float32 (--dtype), and from files that are whole"
        )
    return fine


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of log-probabilities. (…, vocabulary) → (…)"""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def score_texts(lm: Decoder, texts: Sequence[Text]) -> list[Score]:
    """How the model itself reads each text's target behind its prompt, whatever routers say; see `LM.score`."""
    rows = lm.encode(texts)
    for row, text in zip(rows, texts, strict=True):
        if not row.target_ids:
            raise InputError(f"expected an answer to score behind {text.prompt!r}; got an empty one: write it")
    # A target's last token predicts nothing, so answers of one token behind one prompt are one text to run.
    sharing: dict[EncodedText, dict[EncodedText, None]] = {}
    for row in rows:
        sharing.setdefault(EncodedText(row.ids[:-1], row.prompt_length), {})[row] = None
    runs = list(sharing)
    score_of: dict[EncodedText, Score] = {}
    with progress.stage("scoring", len(runs), unit="texts") as advance:
        for part in make_batches([len(run.ids) for run in runs], lm.device):
            score_of |= _batch(lm, {runs[i]: list(sharing[runs[i]]) for i in part})
            advance(len(part))
    return [score_of[row] for row in rows]


def _batch(lm: Decoder, texts: dict[EncodedText, list[EncodedText]]) -> dict[EncodedText, Score]:
    """Runs the texts and scores the rows that end one token behind each."""
    batch = lm.pad(list(texts))  # they end in the last column
    keep = max(len(row.target_ids) for rows in texts.values() for row in rows)
    outputs = lm.forward(batch.ids, batch.mask, batch.positions, None, ends=batch.ends, logits_to_keep=keep)
    scored = {}
    for rows, logits in zip(texts.values(), outputs.logits, strict=True):
        logits = logits[-len(rows[0].target_ids) :].float()  # (tokens of the target, vocabulary)
        fine, log_probs = check_logits(lm, logits), logits.log_softmax(-1)
        best = log_probs.argmax(-1).where(fine, NO_TOKEN)
        for row in rows:
            wanted = torch.tensor(row.target_ids, device=logits.device)
            chosen = log_probs.gather(1, wanted[:, None])[:, 0]
            places = 1 + (log_probs > chosen[:, None]).sum(-1)  # (tokens,)
            rank = int(places.where(fine, log_probs.shape[1]).max())
            correct = tuple((best == wanted).tolist())
            scored[row] = Score(-chosen.mean().item(), correct, tuple(best.tolist()), rank)
    return scored


@torch.no_grad()
def likeliest_tokens(lm: Decoder, rows: Sequence[EncodedText], count: int) -> list[list[tuple[str, float]]]:
    """See `LM.likeliest`."""
    found: list[list[tuple[str, float]]] = [[] for _ in rows]
    for part in make_batches([len(row.ids) for row in rows], lm.device):
        batch = lm.pad([rows[i] for i in part])  # they end in the last column
        outputs = lm.forward(batch.ids, batch.mask, batch.positions, None, ends=batch.ends, logits_to_keep=1)
        logits = outputs.logits[:, -1].float()  # (rows, vocabulary)
        for i, own, fine in zip(part, logits.softmax(-1), check_logits(lm, logits).tolist(), strict=True):
            kept, tokens = own.topk(min(count, len(own)))
            pairs = zip(tokens.tolist(), kept.tolist(), strict=True)
            found[i] = [(lm.tokenizer.decode([token]), p) for token, p in pairs] if fine else []
    return found


@torch.no_grad()
def perplexity(lm: Decoder, texts: Sequence[str], max_tokens: int) -> float:
    """See `LM.perplexity`."""
    total, count = 0.0, 0
    cut = min(max_tokens, lm.max_tokens or max_tokens)
    encoded = encode(lm.tokenizer, [Text(text) for text in texts])  # text to read is no chat
    rows = [EncodedText(row.ids[:cut], 1) for row in encoded if len(row.ids) > 1]
    with progress.stage("reading", len(rows), unit="texts") as advance:
        for part in make_batches([len(row.ids) for row in rows], lm.device):
            batch = lm.pad([rows[i] for i in part])
            logits = lm.forward(batch.ids, batch.mask, batch.positions, None).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none"
            )
            scored = batch.mask[:, :-1] * batch.mask[:, 1:]  # a token behind padding has no context
            check_logits(lm, logits, scored.bool())
            scored = scored.flatten()
            total += float((nll * scored).sum())
            count += int(scored.sum())
            advance(len(part))
    if not count:
        raise InputError("expected texts of at least two tokens; got none: give longer texts")
    return float(torch.tensor(total / count).exp())
