"""How a model reads given answers, teacher-forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reknow.errors import InputError
from reknow.tokens import Row, Text, batches

if TYPE_CHECKING:
    from reknow.lm import LM


@dataclass(frozen=True)
class Score:
    """How a model reads an answer behind a prompt, teacher-forced."""

    nll: float
    """Mean negative log-likelihood of the answer's tokens, in nats."""
    hits: tuple[bool, ...]
    """Per token of the answer: is it the likeliest one, given the tokens before it?"""
    top: tuple[int, ...]
    """The likeliest token at each of these places."""
    rank: int
    """Place of the answer's first token among all tokens; 1 is what the model says."""


@torch.no_grad()
def scores(lm: LM, prompts: Sequence[str], targets: Sequence[str]) -> list[Score]:
    """How the model itself reads each target behind its prompt, whatever routers say; see `LM.score`."""
    rows = lm.encode([Text(p, t) for p, t in zip(prompts, targets, strict=True)])
    for row, prompt in zip(rows, prompts, strict=True):
        if not row.target_ids:
            raise InputError(f"expected an answer to score behind {prompt!r}; got an empty one: write it")
    found: dict[Row, Score] = {}
    unique = list(dict.fromkeys(rows))
    for part in batches([len(row.ids) for row in unique]):
        found.update(_batch(lm, [unique[i] for i in part]))
    return [found[row] for row in rows]


def _batch(lm: LM, rows: list[Row]) -> dict[Row, Score]:
    batch = lm.pad(rows)  # targets end in the last column
    keep = max(len(row.target_ids) for row in rows) + 1
    found = lm.forward(batch.ids, batch.mask, batch.positions, None, ends=batch.ends, logits_to_keep=keep)
    scored = {}
    for row, logits in zip(rows, found.logits, strict=True):
        wanted = torch.tensor(row.target_ids, device=logits.device)
        log_probs = logits[-len(wanted) - 1 : -1].float().log_softmax(-1)  # (tokens of the target, vocabulary)
        best = log_probs.argmax(-1)
        chosen = log_probs.gather(1, wanted[:, None])[:, 0]
        rank = 1 + int((log_probs[0] > chosen[0]).sum())
        scored[row] = Score(-chosen.mean().item(), tuple((best == wanted).tolist()), tuple(best.tolist()), rank)
    return scored
