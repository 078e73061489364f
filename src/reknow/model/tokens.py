"""Where prompt, subject and target sit among the tokens.

Boundaries come from character offsets of the joined text: ` English` after a prompt is another token sequence than
`English` alone, and a beginning-of-text token belongs to no part. Where no space parts prompt and answer, a tokenizer
may make one token of the end of the one and the beginning of the other; then the prompt has the tokens that it has by
itself, behind which a model writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from reknow.edits import Edit, Probe, check_encodable
from reknow.errors import InputError, ModelError, TextRefused
from reknow.model.chat import Chat
from reknow.texts.templates import split_template
from reknow.texts.writing import prepend, separator_between

_T = TypeVar("_T")

TOKENS_PER_BATCH = 4096
"""How many tokens, padding included, one forward pass takes."""
_CACHED_TOKENS = 384
"""The same on a CPU where a pass is read once: what it computes should stay in the processor's cache."""
_LEADS = ("\n", ".", "a")
"""Characters to read an answer behind, the first that stays a token of its own: some tokenizers set a space before
any text."""
_BREAKS = ("\n", ".")
"""What a text may begin behind."""


@dataclass(frozen=True)
class Text:
    """A prompt, the answer that follows it, and the characters of the prompt that name the subject."""

    prompt: str
    target: str = ""
    subject: tuple[int, int] | None = None
    """First character of the subject and the one behind its last, in the prompt."""
    separator: str | None = None
    """What stands between prompt and target; None: what a writer sets there, see `writing.separator_between`."""

    @classmethod
    def of(
        cls, template: str, subject: str, target: str = "", *, prefix: str = "", separator: str | None = None
    ) -> Text:
        """The text of a template with `{}`: knows the subject's place even if its name stands there twice."""
        name = subject.strip()  # a space that ends a subject may be a token of its own, and names nobody
        before, *behind = split_template(template)
        filled = before + subject + "{}".join(behind)
        prompt = prepend(prefix, filled)
        start = len(prompt) - len(filled) + len(before) + subject.index(name)
        return cls(prompt, target, (start, start + len(name)), separator)

    @classmethod
    def asked(cls, edit: Edit, prompt: str | None = None) -> Text:
        """The new answer of the edit behind its own prompt, or behind another one."""
        return cls(edit.text if prompt is None else prompt, edit.target_new, separator=edit.separator)

    @classmethod
    def of_probe(cls, probe: Probe, answer: str | None = None) -> Text:
        """The probe's first answer behind its prompt, or another answer."""
        return cls(probe.prompt, probe.answers[0] if answer is None else answer, separator=probe.separator)

    @classmethod
    def about(cls, edit: Edit, prefix: str = "") -> Text:
        """The new answer behind the edit's own prompt, with the place of its subject."""
        assert edit.subject is not None, "methods check that every edit has a subject"
        return cls.of(edit.prompt, edit.subject, edit.target_new, prefix=prefix, separator=edit.separator)


def as_list(texts: Sequence[_T], what: str) -> list[_T]:
    """The texts as a list; raises InputError for a single one, which would be taken for a list of characters."""
    if isinstance(texts, str):
        raise InputError(f"expected a list of {what}; got one text {texts[:80]!r}: put it in brackets")
    return list(texts)


def pair_texts(
    prompts: Sequence[str], targets: Sequence[str], separators: Sequence[str | None] | None = None
) -> list[Text]:
    """Each prompt with its target; raises InputError where they are not as many, or one is a single text."""
    prompts, targets = as_list(prompts, "prompts"), as_list(targets, "targets")
    separators = [None] * len(prompts) if separators is None else as_list(separators, "separators")
    if len(prompts) != len(targets):
        raise InputError(
            f"expected a target for every prompt; got {len(prompts)} prompts and {len(targets)} targets: pair them"
        )
    if len(separators) != len(prompts):
        raise InputError(
            f"expected a separator for every prompt; got {len(separators)} for {len(prompts)}: pair them"
        )
    return [Text(p, t, separator=between) for p, t, between in zip(prompts, targets, separators, strict=True)]


@dataclass(frozen=True)
class EncodedText:
    """A text as tokens, special tokens included."""

    ids: tuple[int, ...]
    prompt_length: int
    """Number of tokens before the target's first one."""
    subject_last: int | None = None
    """Index of the subject's last token."""
    subject_first: int | None = None
    """Index of its first one."""

    @property
    def target_ids(self) -> tuple[int, ...]:
        return self.ids[self.prompt_length :]


def encode(tokenizer, texts: Sequence[Text], *, chat: bool | Chat = False) -> list[EncodedText]:
    """Tokens of prompt + target, with the place of each part.

    Between prompt and target stands the text's separator; spaces that end a prompt are left out, so that a model
    continues the same tokens whether it is asked to read an answer or to write one. With `chat`, the prompt becomes a
    user's message in the tokenizer's template and the target opens the answer. An empty prompt is the token that
    begins a text.

    Raises:
        TextRefused: a target has no tokens of its own, or nothing stands before it.
        InputError: a text cannot be encoded.
        ModelError: the chat template changes the prompt.
    """
    if not texts:
        return []
    check_encodable("a prompt or answer", [part for text in texts for part in (text.prompt, text.target or "")])
    parts = [_split(tokenizer, text, chat) for text in texts]
    wholes = [head + answer if answer[:1] == " " else head for head, answer, _ in parts]
    behind = _encode_continuations(tokenizer, [answer for _, answer, _ in parts if answer[:1] not in ("", " ")])
    encoding = tokenizer(wholes, add_special_tokens=not chat, return_offsets_mapping=True)
    special = frozenset(tokenizer.all_special_ids)
    rows: list[EncodedText] = []
    for ids, spans, (head, answer, shift), text in zip(
        encoding["input_ids"], encoding["offset_mapping"], parts, texts, strict=True
    ):
        # Some tokenizers close every text with an end token, which would hide the place to continue from.
        while len(ids) > 1 and ids[-1] in special and spans[-1][0] == spans[-1][1]:
            ids, spans = ids[:-1], spans[:-1]
        # Special tokens span (0, 0); a token that is a space alone may have no width, but lies behind the prompt.
        length = next((i for i, (_, end) in enumerate(spans) if end > len(head)), len(ids))
        ids = [*ids, *behind.get(answer, [])]
        if text.target and not 0 < length < len(ids):
            raise TextRefused(
                f"expected a prompt and an answer of at least one token each; got {text.prompt!r} and "
                f"{text.target!r}: write a prompt before the answer"
            )
        first, last = _locate_subject(spans, shift, text)
        rows.append(EncodedText(tuple(ids or _first_tokens(tokenizer)), length or 1, last, first))
    return rows


def _split(tokenizer, text: Text, chat: bool | Chat) -> tuple[str, str, int]:
    """(what stands before the answer, the answer with its separator, shift of the prompt within the whole)."""
    if chat:
        content = text.prompt.strip()  # many templates do
        head = (Chat() if chat is True else chat).head(tokenizer, content)
        place = head.rfind(content)
        if place < 0:
            raise ModelError("expected a chat template that keeps the prompt; this one changes it: use chat=False")
        return head, (text.separator or "") + text.target.strip(), place - text.prompt.find(content)
    head = text.prompt.rstrip(" \u3000")
    separator = separator_between(head, text.target) if text.separator is None else text.separator
    return head, separator + text.target if text.target else "", 0


def _encode_continuations(tokenizer, texts: Sequence[str]) -> dict[str, list[int]]:
    """The tokens of texts that continue others without a space."""
    tokens: dict[str, list[int]] = {}
    for lead in _LEADS:
        missing = [text for text in dict.fromkeys(texts) if text not in tokens]
        if not missing:
            break
        led = [lead + text for text in missing]
        encoding = tokenizer(led, add_special_tokens=False, return_offsets_mapping=True)
        for text, ids, spans in zip(missing, encoding["input_ids"], encoding["offset_mapping"], strict=True):
            first = next((i for i, (_, end) in enumerate(spans) if end > len(lead)), len(ids))
            if first == len(ids) or spans[first][0] >= len(lead):
                tokens[text] = ids[first:]
    left = [text for text in dict.fromkeys(texts) if text not in tokens]
    return tokens | {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in left}


def _first_tokens(tokenizer) -> list[int]:
    """What to continue from where there is no text: the token that begins texts, or the one that ends them; of a
    tokenizer that names neither, a line break, or what it has in its place."""
    for special in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if special is not None:
            return [special]
    for text in _BREAKS:
        if ids := tokenizer(text, add_special_tokens=False)["input_ids"]:
            return ids[-1:]
    raise TextRefused("expected a prompt; got an empty one and a tokenizer without a first token: write a prompt")


def _locate_subject(spans, shift: int, text: Text) -> tuple[int | None, int | None]:
    """Indices of the subject's first and last token; None where the text names none."""
    if text.subject is None:
        return None, None
    start, end = (character + shift for character in text.subject)
    inside = [i for i, (begin, behind) in enumerate(spans) if begin < end and behind > start]
    if not inside:
        raise TextRefused(f"expected the subject among the tokens of {text.prompt!r}; got none: check it")
    return inside[0], inside[-1]


@dataclass(frozen=True)
class Batch:
    """Rows padded into one rectangle; row i begins in column `starts[i]`."""

    ids: Tensor  # (rows, columns)
    mask: Tensor  # (rows, columns), 1 on real tokens
    starts: Tensor  # (rows,)
    ends: Tensor  # (rows,) column behind the prompt's last token

    @property
    def positions(self) -> Tensor:
        """Position of each token in its own row, 0 on padding. (rows, columns)"""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (columns[None] - self.starts[:, None]).clamp(min=0) * self.mask

    def select(self, rows: Tensor) -> Batch:
        """Some of the rows, in the same columns."""
        return Batch(self.ids[rows], self.mask[rows], self.starts[rows], self.ends[rows])


def pad(rows: Sequence[EncodedText], pad_id: int, *, anchors: Sequence[int] | None = None, device=None) -> Batch:
    """Puts the token `anchors[i]` of every row in one column; without anchors the last tokens (left padding)."""
    lengths = [len(row.ids) for row in rows]
    anchors = [n - 1 for n in lengths] if anchors is None else anchors
    column = max(anchors)
    width = column + max(n - a for n, a in zip(lengths, anchors, strict=True))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    starts = torch.tensor([column - anchor for anchor in anchors])
    for i, row in enumerate(rows):
        where = slice(int(starts[i]), int(starts[i]) + lengths[i])
        ids[i, where] = torch.tensor(row.ids)
        mask[i, where] = 1
    ends = starts + torch.tensor([row.prompt_length for row in rows])
    return Batch(ids.to(device), mask.to(device), starts.to(device), ends.to(device))


def split_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in order of length, in one batch, or in two where that spares a fifth of the padded rectangle."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    longest = lengths[order[-1]]
    areas = {cut: cut * lengths[order[cut - 1]] + (len(order) - cut) * longest for cut in range(1, len(order))}
    best = min(areas, key=lambda cut: areas[cut], default=0)
    if not areas or areas[best] > 0.8 * len(order) * longest:
        return [order]
    return [order[:best], order[best:]]


def make_batches(lengths: Sequence[int], device: torch.device | None = None, *, at_least: int = 0) -> list[list[int]]:
    """Indices in order of length, cut so that a padded rectangle holds at most `TOKENS_PER_BATCH` tokens, or
    `at_least` where that is more, or `_CACHED_TOKENS` where the `device` of passes that are read once is a CPU."""
    on_cpu = device is not None and device.type == "cpu"
    limit = min(TOKENS_PER_BATCH, _CACHED_TOKENS) if on_cpu else max(TOKENS_PER_BATCH, at_least)
    parts: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if parts and lengths[i] * (len(parts[-1]) + 1) <= limit:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts
