"""Continuing texts token by token, with no setting but ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from reknow.errors import InputError
from reknow.model.decoder import Decoder
from reknow.model.exact import finite_loss
from reknow.model.parts import embedding_matrix
from reknow.model.scoring import check_logits
from reknow.model.tokens import EncodedText, make_batches
from reknow.progress import progress

CACHE_BYTES = 2**30
"""What keys and values of texts that are written together may take: a pass reads one token of each, and the more
texts, the less each costs."""
MOST_TEXTS = 100
"""Texts beyond which more cost no less, and short ones more, as their prompts leave the processor's cache."""


Listener = Callable[[int, str], object]
"""(which, piece): called for each token of the text of that number, with what the text goes on with in whole
characters, which may be nothing yet. True: enough of it is written."""


def check_sampling(top_k: int | None, temperature: float, top_p: float = 1.0) -> None:
    """Raises InputError where there is nothing to draw from."""
    if not 0 < top_p <= 1:
        raise InputError(f"expected top_p above 0 and at most 1; got {top_p}: 1 draws among all tokens")
    if top_k is not None and not (top_k >= 1 and 0 < temperature < float("inf")):
        raise InputError(
            f"expected top_k of at least 1 and a temperature above 0; got {top_k} and {temperature}: raise them, "
            "or leave top_k out for the most likely tokens"
        )


def continue_texts(
    lm: Decoder,
    rows: Sequence[EncodedText],
    max_new_tokens: int,
    *,
    top_k: int | None,
    temperature: float,
    seed: int,
    top_p: float = 1.0,
    listener: Listener | None = None,
    streams: Sequence[tuple[slice, int]] | None = None,
) -> list[str]:
    """What follows the rows; see `LM.generate`.

    Args:
        streams: (rows, how many tokens at most) of texts that are to be what they would be if their rows were
            continued by themselves, though all are written together, in the order in which they come.
    """
    drawn = [(rows_of, torch.Generator(lm.device).manual_seed(seed)) for rows_of, _ in streams or ()]

    def draw(logits: Tensor, k: int) -> Tensor:
        if streams is None:
            return sample_tokens(logits, k, temperature, top_p=top_p)
        parts = [sample_tokens(logits[rows_of], k, temperature, stream, top_p=top_p) for rows_of, stream in drawn]
        return torch.cat(parts)

    def choose(logits: Tensor) -> Tensor:
        fine = check_logits(lm, logits)
        logits = logits.where(fine[:, None], 0.0)
        token = logits.argmax(-1) if top_k is None else draw(logits, top_k)
        return token.where(fine, silence)  # a model that edits have wrecked says nothing more

    silence = next((end for end in _end_tokens(lm) if end < len(embedding_matrix(lm.model))), 0)
    texts = [""] * len(rows)
    with (
        torch.random.fork_rng(range(torch.cuda.device_count())),
        progress.stage("writing", len(rows), unit="texts") as advance,
    ):
        torch.manual_seed(seed)
        limits = [most for rows_of, most in streams or () for _ in rows[rows_of]] or [max_new_tokens] * len(rows)
        lengths = [len(row.ids) + max_new_tokens for row in rows]
        for part in text_batches(lm, lengths) if streams is None else [[*range(len(rows))]]:
            written = _Written(lm, {i: rows[i] for i in part}, limits, listener)
            decode(lm, [rows[i] for i in part], max_new_tokens, choose, written.take, len(part))
            for i, text in zip(part, written.texts(), strict=True):
                texts[i] = text
            advance(len(part))
    return texts


class _Written:
    """Texts that are written together, token by token, and what a listener has heard of them.

    Args:
        rows: number of each text → what it continues.
        limits: tokens of each text at most.
    """

    def __init__(self, lm: Decoder, rows: dict[int, EncodedText], limits: Sequence[int], listener: Listener | None):
        self._lm, self._rows, self._limits, self._listener = lm, rows, limits, listener
        self._ends = _end_tokens(lm)
        self._tokens: dict[int, list[int]] = {i: [] for i in rows}
        self._heard = dict.fromkeys(rows, "")
        self._ended = set[int]()

    def take(self, tokens: Tensor) -> Tensor:
        """Takes the next token of each text, (rows,), and says which texts are at their end, (rows,)."""
        for i, token in zip(self._rows, tokens.tolist(), strict=True):
            if i not in self._ended:
                self._tokens[i].append(token)
                last = token in self._ends or len(self._tokens[i]) == self._limits[i]
                if self._tell(i, last) or last:
                    self._ended.add(i)
        return torch.tensor([i in self._ended for i in self._rows], device=tokens.device)

    def texts(self) -> list[str]:
        """What is written, in the order of the rows."""
        return [self._text(i) for i in self._rows]

    def _text(self, i: int) -> str:
        return _decode_continuation(self._lm, self._rows[i], self._tokens[i])

    def _tell(self, i: int, whole: bool) -> bool:
        """Tells what is new, and whether the listener has enough. What the next token may change yet is held back:
        half a character, and spaces, which some tokenizers take from before a full stop."""
        if self._listener is None:
            return False
        text, heard = self._text(i), self._heard[i]
        if not whole:
            text = text.rstrip("\ufffd").rstrip()
        new = text[len(heard) :] if text.startswith(heard) else ""
        self._heard[i] += new
        return self._listener(i, new) is True


def _decode_continuation(lm: Decoder, row: EncodedText, tokens: list[int]) -> str:
    """The tokens as text that continues the row's; by themselves, some tokenizers drop the space they begin with."""

    def text(ids: list[int]) -> str:
        return lm.tokenizer.decode(ids, skip_special_tokens=True)

    before, whole = text([row.ids[-1]]), text([row.ids[-1], *tokens])
    return whole.removeprefix(before) if whole.startswith(before) else text(tokens)


def sample_tokens(
    logits: Tensor,
    top_k: int,
    temperature: float,
    generator: torch.Generator | None = None,
    *,
    top_p: float = 1.0,
) -> Tensor:
    """A token for each row of logits (rows, vocabulary), drawn among its `top_k` most likely. (rows,)

    Args:
        generator: None: torch's own randomness.
        top_p: of those the fewest whose chances reach that share of all (nucleus sampling, arXiv 1904.09751).
    """
    kept, tokens = logits.topk(min(top_k, logits.shape[1]))
    chances = (kept / temperature).softmax(-1)
    if top_p < 1:
        chances = chances.where(chances.cumsum(-1) - chances < top_p, 0.0)
    chosen = torch.multinomial(chances if generator is None else chances.to(generator.device), 1, generator=generator)
    return tokens.gather(1, chosen.to(tokens.device))[:, 0]


def sample(
    lm: Decoder,
    rows: Sequence[EncodedText],
    count: int,
    *,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
) -> list[tuple[int, ...]]:
    """`count` tokens drawn behind each row, never the end-of-text token.

    Args:
        top_k: draw among so many of the most likely tokens; None: among all.
        generator: on the CPU; all randomness comes from it.

    Raises:
        InputError: a row and its sample do not fit into the model's positions.
        EditFailed: the model's logits are not finite.
    """
    lm.check_length(rows, count - 1)
    end = lm.tokenizer.eos_token_id

    def choose(logits: Tensor) -> Tensor:
        finite_loss(logits.sum())
        if end is not None:
            logits[:, end] = -torch.inf
        return sample_tokens(logits, top_k or logits.shape[1], temperature, generator)

    return [tuple(tokens) for tokens in decode(lm, rows, count, choose).tolist()]


@torch.no_grad()
def decode(
    lm: Decoder,
    rows: Sequence[EncodedText],
    count: int,
    choose: Callable[[Tensor], Tensor],
    ended: Callable[[Tensor], Tensor] | None = None,
    parts: float = 0,
) -> Tensor:
    """`count` tokens behind each row; fewer if every row has `ended`. (rows, tokens)

    Args:
        choose: the next token of each row, (rows,), of logits (rows, vocabulary) in float32.
        ended: which rows are at their end, (rows,), by the next token of each, (rows,).
        parts: of the work around it, for the estimate of what is left; see `Progress.stage`.
    """
    batch = lm.pad(rows)
    ids, mask, positions = batch.ids, batch.mask, batch.positions
    cache = DynamicCache(config=lm.model.config) if lm.parts.replayable else None
    known = len(embedding_matrix(lm.model))  # a head may be larger, and what it names there could not be read on
    for step in progress.each("", range(count), parts=parts):
        new = slice(-1, None) if cache is not None and step else slice(None)
        read = lm.forward(ids[:, new], mask, positions[:, new], cache, ends=batch.ends, logits_to_keep=1)
        token = choose(read.logits[:, -1, :known].float()).to(ids.device)[:, None]  # (rows, 1)
        ids = torch.cat([ids, token], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
        if ended is not None and bool(ended(token[:, 0]).all()):
            break
    return ids[:, batch.ids.shape[1] :]


def text_batches(lm: Decoder, lengths: Sequence[int]) -> list[list[int]]:
    """Indices of texts in batches of like length."""
    tokens = CACHE_BYTES // (2 * lm.layers * lm.parts.hidden_size * lm.dtype.itemsize)
    parts = []
    for part in make_batches(lengths, at_least=tokens):
        size = -(-len(part) // -(-len(part) // MOST_TEXTS))
        parts += [part[i : i + size] for i in range(0, len(part), size)]
    return parts


def _end_tokens(lm: Decoder) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those the model names (an instruct model's end of turn)."""
    also = getattr(lm.model.generation_config, "eos_token_id", None)
    named = also if isinstance(also, list) else [also]
    return sorted({lm.tokenizer.eos_token_id, *named} - {None})
