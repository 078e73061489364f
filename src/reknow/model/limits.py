"""What a model can read: as many tokens as it has positions for, and those for which its embedding has a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reknow.errors import ModelError, TextRefused
from reknow.model.parts import embedding
from reknow.model.tokens import Row

if TYPE_CHECKING:
    from reknow.lm import LM


def check_length(lm: LM, rows: Sequence[Row], extra: int = 0) -> None:
    """See `LM.check_length`."""
    longest = max((len(row.ids) for row in rows), default=0) + extra
    if lm.max_tokens is not None and longest > lm.max_tokens:
        raise TextRefused(
            f"expected texts of at most {lm.max_tokens} tokens, for which {lm.name} has positions; got "
            f"{longest}{' with what is to be written' if extra else ''}: shorten them"
        )


def check_ids(lm: LM, rows: Sequence[Row]) -> None:
    """Raises ModelError where a row has a token for which the model's embedding has no row."""
    known = len(embedding(lm.model))
    highest = max((max(row.ids) for row in rows), default=0)
    if highest >= known:
        raise ModelError(
            f"expected token ids below {known}, the rows of the embedding of {lm.name}; got {highest}, the token "
            f"{lm.tokenizer.convert_ids_to_tokens(highest)!r}: call "
            "model.resize_token_embeddings(len(tokenizer)), or use the tokenizer that the model was trained with"
        )


def padding(lm: LM) -> int:
    """The id that pads: the tokenizer's where the embedding has it; else any one, since padding is masked."""
    pad = lm.tokenizer.pad_token_id
    return pad if pad is not None and pad < len(embedding(lm.model)) else 0
