"""What SERAC's scope classifiers read: the states of a text's tokens, from a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reknow.errors import InputError
from reknow.learning.loop import seeded
from reknow.lm import LM
from reknow.memories.embedding import encode_ends
from reknow.model.fingerprint import Fingerprint
from reknow.model.hooks import by_row, recorded
from reknow.model.tokens import make_batches

__all__ = ["TEXTS", "StateCache", "States", "token_states"]

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
            for indices in lm.progress.each("reading texts", make_batches(lengths), unit="batches"):
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
            with seeded("encoder"):  # a pooler that a checkpoint lacks is drawn, and is part of the digest
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
