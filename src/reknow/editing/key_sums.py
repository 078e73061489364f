"""Σ k kᵀ of the keys of some matrices over a stream of text, in batches of like length; a killed run goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reknow.datasets.text import TextSource
from reknow.editing import triangle
from reknow.editing.by_expert import Diagonal, from_blocks, shapes, zero_sums
from reknow.editing.triangle import PairedTriangle, Triangle
from reknow.files.cache import warn_if_unwritable
from reknow.files.schema import Count, FormatError, explain, parse_json
from reknow.files.tensors import check_tensor, read_tensors, write_tensors
from reknow.lm import LM
from reknow.model.exact import exact, exact_device
from reknow.model.hooks import by_row, recorded
from reknow.model.parts import device_of, groups, shape
from reknow.model.tokens import EncodedText, Text, encode

__all__ = ["BATCHES", "ROW_TOKENS", "Task", "all_finite", "check_blocks", "read_batches", "save", "sum_keys"]

_log = logging.getLogger(__name__)

Sums = Triangle | PairedTriangle | Diagonal
"""Σ k kᵀ of one matrix."""

ROW_TOKENS = 128
"""Texts are cut into rows of this many tokens."""
_BATCH_TOKENS = 16 * ROW_TOKENS
"""Columns of a batch in all its rows, padding among them."""
_SORTED_ROWS = 512
"""Rows that are sorted by length before they are put into batches: paragraphs are of any length, and in the order of
the text more than half of what is computed would be padding."""
BATCHES = [_BATCH_TOKENS, _SORTED_ROWS]
"""What the number of a batch depends on, beside the text."""
_SAVE_SECONDS = 30.0
"""How often a running sum is written."""


class Task(NamedTuple):
    """The keys that one process sums: at these matrices, in every `world`th batch of the text from number `rank` on.

    `sums_file` has what is summed so far, with the number of the next batch.
    """

    lm: LM
    names: list[str]
    source: TextSource
    tokens: int
    sums_file: Path
    rank: int
    world: int


@torch.no_grad()
def sum_keys(task: Task) -> tuple[dict[str, Sums], int]:
    """Σ k kᵀ by matrix name and the number of keys; what an earlier run left in `sums_file` is taken up."""
    lm, names, source = task.lm, task.names, task.source
    modules = {name: lm.model.get_submodule(name) for name in names}
    widths = {name: (shape(module)[1], groups(module)) for name, module in modules.items()}
    totals, count, following = _resume(task.sums_file, widths)
    if not totals:
        totals = {name: zero_sums(*width, torch.device("cpu")) for name, width in widths.items()}
    totals = {name: total.to(exact_device(device_of(modules[name], lm.device))) for name, total in totals.items()}
    saved = time.monotonic()
    what = f"reading {source.name} for statistics"
    with lm.unpatched(), lm.progress.stage(what, task.tokens, unit="tokens") as advance:
        for number, rows in enumerate(read_batches(lm, source.texts(), task.tokens)):
            advance(sum(len(row.ids) for row in rows))
            if number < following or number % task.world != task.rank:
                continue
            batch = lm.pad(rows)
            with recorded(lm.model, names, stop=True) as (seen, _):
                lm.forward(batch.ids, batch.mask, batch.positions, None)
            for name in names:
                states = by_row(seen[name], len(rows))
                keys, total = states[batch.mask.bool().to(states.device)], totals[name]  # (tokens, in)
                total.add_products(keys if isinstance(total, Diagonal) else exact(keys))
            count += int(batch.mask.sum())
            if time.monotonic() - saved >= _SAVE_SECONDS:
                running = {part: block for name in names for part, block in totals[name].named(name).items()}
                save(running, task.sums_file, {"count": str(count), "following": str(number + 1), "name": lm.name})
                saved = time.monotonic()
    return totals, count


def _resume(sums_file: Path, widths: dict[str, tuple[int, int]]) -> tuple[dict[str, Sums], int, int]:
    """The sums in the file, the number of keys and of the next batch; nothing where there is no whole file.

    Args:
        widths: of the matrices that are summed, by name, and among how many experts they are divided.
    """
    if sums_file.is_file():
        try:
            sealed, totals = read_tensors(sums_file), dict[str, Sums]()
            for name, (width, parts) in widths.items():
                if parts == 1 and width > triangle.LARGE:
                    high, low = (
                        _own(sealed.tensors, part, width, 1, dtype)
                        for part, dtype in ((name, "float32"), (f"{name}.low", "bfloat16"))
                    )
                    totals[name] = PairedTriangle(high, low)
                else:
                    totals[name] = from_blocks(_own(sealed.tensors, name, width, parts, "float64"), parts)
            count, following = (parse_json(Count, sealed.metadata.get(part, "")) for part in ("count", "following"))
            _log.info("going on behind %d tokens that an earlier run read", count)
            return totals, count, following
        except (OSError, FormatError) as error:
            _log.warning("%s is broken (%s); the text is read from its beginning", sums_file, explain(error))
    return {}, 0, 0


def _own(tensors: dict[str, Tensor], name: str, width: int, parts: int, kind: str) -> list[Tensor]:
    """The blocks of one matrix; raises FormatError where they are others."""
    wanted = {f"{name}.{i}": block for i, block in enumerate(shapes(width, parts))}
    return check_blocks({part: tensor for part, tensor in tensors.items() if part in wanted}, wanted, kind)


def read_batches(lm: LM, texts: Iterator[str], tokens: int) -> Iterator[list[EncodedText]]:
    """The rows of the texts in batches of like length."""
    rows = _rows(lm, texts, tokens)
    while some := sorted(islice(rows, _SORTED_ROWS), key=lambda row: len(row.ids)):
        batch: list[EncodedText] = []
        for row in some:  # each is at least as long as those before
            if batch and len(row.ids) * (len(batch) + 1) > _BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(row)
        yield batch


def _rows(lm: LM, texts: Iterator[str], tokens: int) -> Iterator[EncodedText]:
    """The texts cut into rows, until `tokens` tokens are read."""
    around = lm.tokenizer("")["input_ids"]  # what the tokenizer puts before and behind a text
    for text in texts:
        (row,) = encode(lm.tokenizer, [Text(text)])  # general text is no chat
        # What begins a text begins every row of it: a model that is used to such a token is lost without.
        begin = tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(row.ids, around, strict=False)))
        width = max(1, min(ROW_TOKENS, lm.max_tokens or ROW_TOKENS) - len(begin))
        for start in range(len(begin), max(len(row.ids), len(begin) + 1), width):
            ids = (begin + row.ids[start : start + width])[:tokens]
            tokens -= len(ids)
            yield EncodedText(ids, len(ids))
            if not tokens:
                return


def check_blocks(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]], kind: str) -> list[Tensor]:
    """The tensors of these names in order; raises FormatError where they are others."""
    found = [check_tensor(name, tensors.get(name), kind, 2) for name in shapes]
    if [tuple(block.shape) for block in found] != list(shapes.values()) or len(tensors) != len(shapes):
        raise FormatError("its matrices are of other sizes")
    if not all_finite(found):
        raise FormatError("it has NaN or infinity")
    return found


def all_finite(blocks: Sequence[Tensor]) -> bool:
    return all(bool(block.isfinite().all()) for block in blocks)


def save(tensors: dict[str, Tensor], file: Path, about: dict[str, str]) -> None:
    """Writes them into the cache, with a warning where that fails."""
    with warn_if_unwritable():
        write_tensors(file, tensors, about)
