"""Scope classifiers: does a question fall in the scope of an edit? (SERAC, Mitchell et al. 2022, arXiv 2206.06520)

Both read the states of a text's tokens, from a frozen encoder, and learn what to take from them:

* `AttentionPooling`: a vector for each text alone, p = exp(−‖a − b‖²) or exp(cos − 1), so that stored edits can be
  searched;
* `Cross`: the two texts together, p = σ(logit), once for every pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reknow.errors import InputError
from reknow.memories.embedding import encode_ends
from reknow.model.fingerprint import Fingerprint
from reknow.model.hooks import by_row, recorded
from reknow.model.tokens import make_batches

if TYPE_CHECKING:
    from reknow.lm import LM

__all__ = ["TEXTS", "AttentionPooling", "Cross", "StateCache", "States", "log_in_scope", "scope_loss", "token_states"]

States = tuple[Tensor, Tensor]
"""States of the tokens of several texts (texts, tokens, features), and which tokens are real (texts, tokens)."""

TEXTS = 64
"""Texts that a sentence encoder reads at once."""


class _TokenStates(Protocol):
    """Reads texts; what it knows is frozen."""

    features: int
    digest: str | None
    """Tells one encoder from another; None where the patch's own model is the encoder."""

    def __call__(self, texts: Sequence[str]) -> States: ...


def token_states(lm: LM, encoder: str | None) -> _TokenStates:
    """The base model itself, or any Hugging Face encoder; kept with the LM.

    Raises:
        InputError: the encoder cannot be loaded.
    """

    def load() -> _TokenStates:
        return _OwnStates(lm) if encoder is None else _EncoderStates(lm, encoder)

    return lm.cached(("token_states", encoder), load)


class _OwnStates:
    """States of the base model, whatever is applied to it: what enters the first block of each third."""

    digest: str | None = None

    def __init__(self, lm: LM):
        self._lm, blocks = lm, lm.parts.blocks
        self._names = list(dict.fromkeys(blocks[len(blocks) * third // 3] for third in range(3)))
        self.features = len(self._names) * lm.model.config.get_text_config(decoder=True).hidden_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> States:
        lm = self._lm
        rows = encode_ends(lm, texts)
        lengths = [len(row.ids) for row in rows]
        states = torch.zeros(len(rows), max(lengths), self.features, device=lm.device)
        with lm.unpatched():
            for indices in make_batches(lengths):
                batch = lm.pad([rows[i] for i in indices], anchors=[0] * len(indices))
                with recorded(lm.model, self._names, stop=True) as (seen, _):
                    lm.forward(batch.ids, batch.mask, batch.positions, None)
                entering = [by_row(seen[name], len(indices)).to(lm.device).float() for name in self._names]
                normed = [F.layer_norm(each, each.shape[-1:]) for each in entering]
                states[indices, : batch.ids.shape[1]] = torch.cat(normed, -1)
        columns = torch.arange(max(lengths), device=lm.device)
        return states, columns[None] < torch.tensor(lengths, device=lm.device)[:, None]


class StateCache:
    """Reads every text once: its states are kept in half precision until they fill `limit` bytes."""

    def __init__(self, read: Callable[[Sequence[str]], States], limit: int = 2**31):
        self._read, self._bytes_left = read, limit
        self._cached: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> States:
        states = {text: self._cached[text] for text in texts if text in self._cached}
        new = [text for text in dict.fromkeys(texts) if text not in states]
        if new:
            for text, tokens, mask in zip(new, *self._read(new), strict=True):
                states[text] = tokens[mask].half()  # (tokens, features)
                self._bytes_left -= states[text].nbytes
                if self._bytes_left > 0:
                    self._cached[text] = states[text]
        lengths = torch.tensor([len(states[text]) for text in texts], device=states[texts[0]].device)
        padded = nn.utils.rnn.pad_sequence([states[text] for text in texts], batch_first=True).float()
        return padded, torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None]


class _EncoderStates:
    """Last states of a Hugging Face encoder such as BERT, from a folder or by name."""

    def __init__(self, lm: LM, name: str):
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
            self._model = AutoModel.from_pretrained(name, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise InputError(
                f"expected a Hugging Face encoder; {name!r} cannot be loaded ({error}): give its folder, or leave it "
                "out to use the model's own states"
            ) from error
        self._model.eval().requires_grad_(False).to(lm.device)
        self.features = self._model.config.hidden_size
        self.digest: str | None = Fingerprint.of(self._model, self._tokenizer).digest

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> States:
        limit = min(self._tokenizer.model_max_length, self._model.config.max_position_embeddings)
        encoding = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(self._model.device)
        batches = [
            self._model(**{name: values[start : start + TEXTS] for name, values in encoding.items()})
            for start in range(0, len(texts), TEXTS)
        ]
        states = torch.cat([batch.last_hidden_state for batch in batches])
        return F.layer_norm(states, states.shape[-1:]), encoding["attention_mask"].bool()


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
