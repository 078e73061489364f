"""SERAC's scope classifiers: does a question fall in the scope of an edit? (Mitchell et al. 2022, arXiv 2206.06520)

* `AttentionPooling`: a vector for each text alone, p = exp(−‖a − b‖²) or exp(cos − 1), so that stored edits can be
  searched;
* `Cross`: the two texts together, p = σ(logit), once for every pair.

Either reads the states of a text's tokens (`reknow.memories.serac.states`), and learns what to take from them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reknow.memories.serac.states import States

__all__ = ["AttentionPooling", "Cross", "log_in_scope", "scope_loss"]


class AttentionPooling(nn.Module):
    """Learned queries that each attend to the tokens of a text; what they gather, side by side, is its vector.

    Args:
        features: numbers of a token's states.
        size: numbers of the vector, a multiple of `queries`.
    """

    def __init__(self, features: int, size: int, queries: int):
        super().__init__()
        self.attention = nn.Linear(features, queries)
        self.value = nn.Linear(features, size, bias=False)
        nn.init.zeros_(self.attention.weight)  # at first every token counts the same
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, states: States) -> Tensor:
        """(texts, size)"""
        tokens, mask = states
        weight = self.attention(tokens).masked_fill(~mask[..., None], -torch.inf).softmax(1)
        value = self.value(tokens).unflatten(-1, (weight.shape[-1], -1))  # (…, queries, size / queries)
        return (weight[..., None] * value).sum(1).flatten(1) * self.scale.exp()


class Cross(nn.Module):
    """A small transformer that reads the states of an edit and of an input together."""

    WIDTH, LAYERS, HEADS = 96, 2, 4

    def __init__(self, features: int):
        super().__init__()
        self.enter = nn.Linear(features, self.WIDTH)
        self.text = nn.Parameter(torch.randn(2, self.WIDTH) * 0.1)
        """Added to the tokens of the edit, and of the input."""
        self.verdict = nn.Parameter(torch.randn(self.WIDTH) * 0.1)
        """The place where the answer is read."""
        layer = nn.TransformerEncoderLayer(
            self.WIDTH, self.HEADS, 2 * self.WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, self.LAYERS, enable_nested_tensor=False)
        self.leave = nn.Linear(self.WIDTH, 1)

    def forward(self, edits: States, inputs: States) -> Tensor:
        """log p of each pair. (pairs,)"""
        pairs = len(edits[0])
        tokens = [self.enter(states) + self.text[i] for i, (states, _) in enumerate((edits, inputs))]
        read = torch.cat([self.verdict.expand(pairs, 1, -1), *tokens], 1)
        mask = torch.cat([edits[1].new_ones(pairs, 1), edits[1], inputs[1]], 1)
        return F.logsigmoid(self.leave(self.layers(read, src_key_padding_mask=~mask)[:, 0])[:, 0])


def log_in_scope(inputs: Tensor, edits: Tensor, *, cosine: bool) -> Tensor:
    """log p that each input is in the scope of each edit: −‖a − b‖², or cos − 1. (inputs, edits)"""
    if cosine:
        return F.normalize(inputs, dim=-1) @ F.normalize(edits, dim=-1).T - 1
    return -(inputs[:, None] - edits[None]).pow(2).sum(-1)


def scope_loss(log_inside: Tensor, log_outside: Tensor) -> Tensor:
    """Mean −log p over pairs that are in scope, plus mean −log(1 − p) over pairs that are not."""
    outside = 1 - log_outside.exp()
    return -log_inside.mean() - outside.clamp(min=torch.finfo(outside.dtype).eps).log().mean()
