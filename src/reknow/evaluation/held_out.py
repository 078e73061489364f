"""Given text under an edited model: its perplexity, and how far the model has moved on it from the unedited one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from reknow.errors import InputError
from reknow.evaluation.readings import finite_nats
from reknow.lm import LM
from reknow.model.scoring import check_logits, kl_divergence
from reknow.model.tokens import EncodedText, Text, encode, make_batches

__all__ = ["HeldOut", "next_log_probs"]

_TEXT_TOKENS = 256
"""At which the texts are cut, as `LM.perplexity` cuts them."""
_COMPARED_TOKENS = 2000
"""Over how many predictions KL is taken at most: of each one, distributions over the vocabulary are kept."""


class HeldOut:
    """Texts, and what a model predicts at each of their tokens, for edited models to be compared with it.

    Its log-probabilities are kept on the CPU in float16, 2 bytes × vocabulary for each prediction (100 MB for a
    thousand with 49,000 tokens). They are normalised again in float32, so that KL to them is none below zero; what
    rounding adds is some 1e-6 nats, so that a model equal to the first is as far from it.

    Args:
        lm: the model to compare with, as it is now.

    Attributes:
        perplexity: of the texts under that model.

    Raises:
        InputError: no text has two tokens.
    """

    def __init__(self, lm: LM, texts: Sequence[str]):
        cut = min(_TEXT_TOKENS, lm.max_tokens or _TEXT_TOKENS)
        encoded = encode(lm.tokenizer, [Text(text) for text in texts])  # text to read is no chat
        self._rows = [EncodedText(row.ids[:cut], 1) for row in encoded if len(row.ids) > 1]
        if not self._rows:
            raise InputError("expected texts of at least two tokens; got none: give longer texts")
        upto = accumulate(len(row.ids) - 1 for row in self._rows)
        self._compared = {i for i, count in enumerate(upto) if count <= _COMPARED_TOKENS} or {0}
        self._before: dict[int, Tensor] = {}
        self.perplexity = self._read(lm, keep=True)[0]

    def read(self, lm: LM) -> tuple[float, float]:
        """The perplexity of the texts under a model as it is now, and KL(first model ‖ this one), the mean over the
        first 2,000 tokens, in nats; at most 690 where the model's logits are no numbers."""
        return self._read(lm, keep=False)

    @torch.no_grad()
    def _read(self, lm: LM, *, keep: bool) -> tuple[float, float]:
        nll, divergence, count, compared = 0.0, 0.0, 0, 0
        with lm.exclusive():
            for i, found in self._log_probs(lm):
                coming = torch.tensor(self._rows[i].ids[1:], device=found.device)  # (tokens,)
                nll -= float(found.gather(1, coming[:, None]).sum())
                count += len(coming)
                if i not in self._compared:
                    continue
                if keep:
                    self._before[i] = found.to("cpu", torch.float16)
                    continue
                before = self._before[i].to(found.device).float().log_softmax(-1)
                divergence += float(kl_divergence(before, found).sum())
                compared += len(coming)
        moved = max(0.0, finite_nats(divergence / compared)) if compared else 0.0
        return math.exp(finite_nats(nll / count)), moved

    def _log_probs(self, lm: LM) -> Iterator[tuple[int, Tensor]]:
        """Number of each text, and log-probabilities of what follows its tokens but the last. (tokens, vocabulary)"""
        for part in make_batches([len(row.ids) for row in self._rows], lm.device):
            found = next_log_probs(lm, [self._rows[i] for i in part])
            yield from ((i, one[:-1]) for i, one in zip(part, found, strict=True))


@torch.no_grad()
def next_log_probs(lm: LM, rows: Sequence[EncodedText]) -> list[Tensor]:
    """Log-probabilities of the next token behind each token of the rows, each (tokens, vocabulary); what routers say
    and memories that rewrite prompts do not count."""
    batch = lm.pad(rows)
    logits = lm.forward(batch.ids, batch.mask, batch.positions, None).logits
    check_logits(lm, logits, batch.mask.bool())
    starts = batch.starts.tolist()
    return [
        logits[i, start : start + len(row.ids)].float().log_softmax(-1)
        for i, (start, row) in enumerate(zip(starts, rows, strict=True))
    ]
