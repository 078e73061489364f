"""Losses of tokens: rows of texts and the places in them whose predictions are scored, read again and again.

The blocks below the layer that is trained are run once; every reading begins there, with what is trained as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reknow.model.decoder import Decoder
from reknow.model.replay import BlockReplay
from reknow.model.tokens import EncodedText, make_batches

__all__ = ["AnswerLoss", "ScoredTokens", "predictions"]


def predictions(row: EncodedText, first: int) -> list[tuple[int, int]]:
    """(index of the token that predicts, token predicted) of the row's tokens from the index `first` on."""
    return [(i - 1, row.ids[i]) for i in range(first, len(row.ids))]


class ScoredTokens:
    """Rows of tokens and the places in them whose predictions enter a loss.

    Args:
        pairs: per row, (index of the token that predicts, token predicted); what follows the last one is cut off.
        layer: the blocks below this one are run once and reused; None: every pass runs all, which is cheaper for
            rows that are read once or twice.
        keep: with a layer, what that one run says is kept for `log_probs_at_first`.

    Attributes:
        of_row: (n,) row of each scored place, in the order of `pairs`.
        targets: (n,) token predicted there.
        places: (rows, columns) bool, the scored places in the padded batch.
        real: (rows, columns) bool, its real tokens.

    Raises:
        InputError: a row is longer than the model's positions.
    """

    def __init__(
        self,
        lm: Decoder,
        rows: Sequence[EncodedText],
        pairs: Sequence[Sequence[tuple[int, int]]],
        layer: int | None,
        *,
        keep: bool = False,
    ):
        ends = [max(column for column, _ in scored) + 1 for scored in pairs]
        rows = [EncodedText(row.ids[:end], min(row.prompt_length, end)) for row, end in zip(rows, ends, strict=True)]
        self._lm, self._batch = lm, lm.pad(rows)
        starts = self._batch.starts.tolist()
        flat = [(i, starts[i] + c, token) for i, scored in enumerate(pairs) for c, token in scored]
        columns = [torch.tensor(values, device=lm.device) for values in zip(*flat, strict=True)]
        self.of_row, self._columns, self.targets = columns
        self.real = self._batch.mask.bool()
        self.places = torch.zeros_like(self.real)
        self.places[self.of_row, self._columns] = True
        lengths = torch.tensor([len(scored) for scored in pairs], device=lm.device)
        self._shares = 1 / lengths[self.of_row]  # (n,)
        self._replay = None if layer is None else BlockReplay(lm, self._batch, layer, 0, keep=keep)

    @property
    def keys(self) -> Tensor:
        """Input of the value matrix of `layer`, which no change of that matrix moves. (rows, columns, in)"""
        assert self._replay is not None, "a layer was given"
        return self._replay.keys

    def log_probs(self, added: Tensor | None = None) -> Tensor:
        """Log-probabilities of all tokens at the scored places, with the weights as they are now. (n, vocabulary)

        Args:
            added: (rows, columns, hidden), added at the output of that value matrix.
        """
        if self._replay is not None:
            places = self.of_row, self._columns
            logits = self._replay.rerun(*places) if added is None else self._replay(added, *places)
            return logits.float().log_softmax(-1)
        batch, first = self._batch, int(self._columns.min())
        keep = batch.ids.shape[1] - first
        inputs = (batch.ids, batch.mask, batch.positions, None)
        logits = self._lm.forward(*inputs, ends=batch.ends, logits_to_keep=keep).logits
        return logits[:, -keep:][self.of_row, self._columns - first].float().log_softmax(-1)

    def log_probs_at_first(self) -> Tensor:
        """`log_probs` with the weights as they were when the blocks below were run. (n, vocabulary)"""
        assert self._replay is not None, "a layer was given"
        return self._replay.logits_at_first(self.of_row, self._columns).float().log_softmax(-1)

    def nll(self, added: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each predicted token, in nats; see `log_probs`. (n,)"""
        return -self.log_probs(added).gather(1, self.targets[:, None])[:, 0]

    def row_nll(self, added: Tensor | None = None) -> Tensor:
        """The same as a mean over each row's scored tokens. (rows,)"""
        nll = self.nll(added) * self._shares
        return nll.new_zeros(len(self.real)).index_add(0, self.of_row, nll)


class AnswerLoss:
    """The answers of some edits behind their prompts, in batches whose blocks below `layer` are run once.

    Args:
        rows: encoded prompts with their answers.

    Attributes:
        batch: indices of the edits whose batch runs, for hooks that do something else for each. (rows,)
    """

    def __init__(self, lm: Decoder, rows: Sequence[EncodedText], layer: int):
        self._batches: list[tuple[Tensor, ScoredTokens]] = []
        for batch in make_batches([len(row.ids) for row in rows]):
            here = [rows[i] for i in batch]
            scored = ScoredTokens(lm, here, [predictions(row, row.prompt_length) for row in here], layer)
            self._batches.append((torch.tensor(batch, device=lm.device), scored))

    def nll(self) -> Tensor:
        """Mean negative log-likelihood of each answer's tokens, in nats. (edits,)"""
        losses: list[Tensor] = []
        for batch, scored in self._batches:
            self.batch = batch
            losses.append(scored.row_nll())
        return torch.cat(losses)[torch.cat([batch for batch, _ in self._batches]).argsort()]
