"""The covariance of keys, C = E[k kᵀ], of the unedited model over general text (ROME, arXiv 2202.05262, eq. 2).

The text is read as a stream, every layer that is asked for in one pass, and the lower triangle of k kᵀ is summed in
float64, which takes 4 · in² bytes per layer. What was summed is written every half minute, and a killed run goes on
there. The mean is kept in float32.

First tokens of texts, attention sinks in many models, are part of it: their keys are huge, but of one direction. To
spare it costs nothing, and left out it would be changed most.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor

from reknow.checks.arguments import typed
from reknow.datasets.text import TextSource, text_source
from reknow.editing.triangle import Triangle, block_shapes
from reknow.errors import EditFailed, InputError
from reknow.files.cache import cache_folder, cache_limit, evict, mark_used, warn_if_unwritable
from reknow.files.locks import write_lock
from reknow.files.schema import Count, FormatError, explain, parse_json
from reknow.files.tensors import check_tensor, read_tensors, write_tensors
from reknow.lm import LM
from reknow.model.exact import exact, exact_device
from reknow.model.exclusive import typed_exclusively
from reknow.model.hooks import by_row, recorded
from reknow.model.parts import device_of, shape
from reknow.model.tokens import EncodedText, Text, encode

__all__ = ["Statistics", "covariance", "statistics"]

_log = logging.getLogger(__name__)

_FORMAT = 4
"""Counts up when the same settings give other statistics."""
_ROW_TOKENS = 128
"""Texts are cut into rows of this many tokens."""
_ROWS = 16
"""Rows that are read together."""
_SAVE_SECONDS = 30.0
"""How often a running sum is written."""


@dataclass(frozen=True)
class Statistics:
    """C of one matrix, and where it is kept."""

    covariance: Tensor  # (in, in), float32, on the device of the matrix
    tokens: int
    """How many tokens were read."""
    file: Path


@typed
def covariance(
    lm: LM, layer: int, *, tokens: int = 100_000, text: str | Path | Sequence[str] | None = None
) -> Tensor:
    """C, the mean of k kᵀ over text tokens at the input of layer `layer`'s value matrix; see `statistics`.

    Returns:
        (in, in), float32, on the device of the matrix.
    """
    return statistics(lm, [layer], tokens=tokens, text=text)[layer].covariance


@typed_exclusively
def statistics(
    lm: LM,
    layers: Sequence[int],
    *,
    tokens: int = 100_000,
    text: str | Path | Sequence[str] | None = None,
    state: PartialState | None = None,
) -> dict[int, Statistics]:
    """Statistics of several layers with no patch applied, in one pass over the text.

    Kept on disk under all that they depend on: base model, matrix, text, number of tokens, dtype.

    Args:
        tokens: how many to read at most; the papers use 100,000 texts, 0.3 % of it gives the same edits.
        text: see `datasets.text.text_source`; None: the bundled WikiText sample.
        state: Accelerate's, where several processes call this together: each reads its share.

    Raises:
        InputError: no such layer; no tokens are to be read; the text is empty; they are not kept and
            `lm.computes_statistics` is off.
        EditFailed: the keys are not finite.
    """
    if tokens < 1:
        raise InputError(f"expected at least one token to read for statistics; got {tokens}: raise it")
    source = text_source(text)
    names = {layer: lm.parts.value[lm.check_layer(layer)] for layer in dict.fromkeys(layers)}
    keys = {layer: _key(lm, name, source, tokens) for layer, name in names.items()}
    found = {layer: kept for layer, key in keys.items() if (kept := _load(lm, key))}
    missing = [layer for layer in keys if layer not in found]
    if state is not None:  # another process may have another disk
        missing = sorted(set(gather_object(missing)))
    if missing and not lm.computes_statistics:
        numbers = ",".join(map(str, missing))
        raise InputError(
            f"expected kept statistics of layer {numbers} of {lm.name}; there are none of this text and size: "
            f"run reknow stats --layers {numbers} first, or leave --no-stats out"
        )
    if missing:
        cache_limit()  # a wrong one is refused before the work
        _log.info("reading %d tokens of %s for the statistics of layers %s", tokens, source.name, missing)
        found |= _compute(lm, {layer: keys[layer] for layer in missing}, source, tokens, state)
    return {layer: found[layer] for layer in keys}


def _key(lm: LM, name: str, source: TextSource, tokens: int) -> dict[str, str]:
    """All that the statistics of the matrix `name` depend on."""
    return {
        "format": f"{_FORMAT}, rows of {_ROW_TOKENS}",
        "model": lm.fingerprint.digest,
        "matrix": name,
        "text": source.digest,
        "tokens": str(tokens),
        "dtype": str(lm.dtype),
    }


def _file(kind: str, key) -> Path:
    return cache_folder() / f"{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.safetensors"


def _device(lm: LM, name: str) -> torch.device:
    return device_of(lm.model.get_submodule(name), lm.device)


def _save(tensors: dict[str, Tensor], file: Path, about: dict[str, str]) -> None:
    with warn_if_unwritable():
        write_tensors(file, tensors, about)


def _remove(file: Path) -> None:
    with suppress(OSError):  # a cache that cannot be written to has none
        file.unlink(missing_ok=True)


def _load(lm: LM, key: dict[str, str]) -> Statistics | None:
    """The statistics kept under `key`; None where there are none, or where their file is broken or of another key."""
    file = _file("covariance", key)
    if not os.path.isfile(file):  # the folder may not be readable
        return None
    try:
        sealed = read_tensors(file)
        if any(sealed.metadata.get(name) != value for name, value in key.items()):
            raise FormatError("it is that of another matrix")
        blocks = _check_blocks(sealed.tensors, _blocks(lm, key["matrix"]), "float32")
        count = parse_json(Count, sealed.metadata.get("read", ""))
    except (OSError, FormatError) as error:
        _log.warning("%s is broken and is made again: %s", file, explain(error))
        return None
    mark_used(file)
    return Statistics(Triangle(blocks).to(_device(lm, key["matrix"])).full(), count, file)


def _blocks(lm: LM, name: str) -> dict[str, tuple[int, int]]:
    """The tensors in the file of the matrix, with their shapes."""
    width = shape(lm.model.get_submodule(name))[1]
    return {f"covariance.{i}": block for i, block in enumerate(block_shapes(width))}


def _check_blocks(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int]], kind: str) -> list[Tensor]:
    """The tensors of these names in order; raises FormatError where they are others."""
    found = [check_tensor(name, tensors.get(name), kind, 2) for name in shapes]
    if [tuple(block.shape) for block in found] != list(shapes.values()) or len(tensors) != len(shapes):
        raise FormatError("its matrices are of other sizes")
    if not _finite(found):
        raise FormatError("it has NaN or infinity")
    return found


def _finite(blocks: Sequence[Tensor]) -> bool:
    return all(bool(block.isfinite().all()) for block in blocks)


def _compute(
    lm: LM, keys: dict[int, dict[str, str]], source: TextSource, tokens: int, state: PartialState | None
) -> dict[int, Statistics]:
    """The statistics, read from text and kept, or what another process has kept meanwhile."""
    rank, world = (0, 1) if state is None else (state.process_index, state.num_processes)
    sums_file = _file("sums", [list(keys.values()), rank, world])
    with write_lock(sums_file, wait=math.inf):
        kept = {layer: one for layer, key in keys.items() if (one := _load(lm, key))}
        if world == 1 and len(kept) == len(keys):
            return kept
        names = [key["matrix"] for key in keys.values()]
        totals, count = _sum_keys(_Task(lm, names, source, tokens, sums_file, rank, world))
        if world > 1:
            totals = {name: Triangle([_add_up(block) for block in total.blocks]) for name, total in totals.items()}
            count = int(_add_up(torch.tensor(count, device=lm.device)))
        if not count:
            raise InputError(
                f"expected text to read keys from; got none in {source.name}: give texts of at least one word"
            )
        found = {}
        for layer, key in keys.items():
            blocks, file = totals.pop(key["matrix"]).blocks, _file("covariance", key)
            mean = Triangle([block.div_(count).float() for block in blocks])
            if not _finite(mean.blocks):
                _remove(sums_file)
                raise EditFailed(
                    f"expected finite keys; {lm.name} gives NaN or infinity at {key['matrix']}: try another dtype"
                )
            if state is None or state.is_local_main_process:
                _save(mean.named("covariance"), file, key | {"read": str(count), "name": lm.name})
            found[layer] = Statistics(mean.full(), count, file)
        _remove(sums_file)
        evict(using=[one.file for one in found.values()])
        if state is not None:
            state.wait_for_everyone()
        return found


def _add_up(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors."""
    total = reduce(tensor, "sum")
    assert isinstance(total, Tensor)
    return total


class _Task(NamedTuple):
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
def _sum_keys(task: _Task) -> tuple[dict[str, Triangle], int]:
    """Σ k kᵀ by matrix name and the number of keys; what an earlier run left in `sums_file` is taken up."""
    lm, names, source = task.lm, task.names, task.source
    widths = {name: shape(lm.model.get_submodule(name))[1] for name in names}
    totals, count, following = _resume(task.sums_file, widths)
    if not totals:
        totals = {name: Triangle.zeros(width, torch.device("cpu")) for name, width in widths.items()}
    totals = {name: total.to(exact_device(_device(lm, name))) for name, total in totals.items()}
    saved = time.monotonic()
    with lm.unpatched(), lm.progress.stage(f"reading {source.name} for statistics, tokens", task.tokens) as advance:
        for number, rows in enumerate(_batches(lm, source.texts(), task.tokens)):
            advance(sum(len(row.ids) for row in rows))
            if number < following or number % task.world != task.rank:
                continue
            batch = lm.pad(rows)
            with recorded(lm.model, names, stop=True) as (seen, _):
                lm.forward(batch.ids, batch.mask, batch.positions, None)
            for name in names:
                states = by_row(seen[name], len(rows))
                keys = exact(states[batch.mask.bool().to(states.device)])  # (tokens, in)
                totals[name].add_products(keys)
            count += int(batch.mask.sum())
            if time.monotonic() - saved >= _SAVE_SECONDS:
                running = {part: block for name in names for part, block in totals[name].named(name).items()}
                _save(running, task.sums_file, {"count": str(count), "following": str(number + 1), "name": lm.name})
                saved = time.monotonic()
    return totals, count


def _resume(sums_file: Path, widths: dict[str, int]) -> tuple[dict[str, Triangle], int, int]:
    """The sums in the file, the number of keys and of the next batch; nothing where there is no whole file.

    Args:
        widths: of the matrices that are summed, by name.
    """
    if sums_file.is_file():
        try:
            sealed, totals = read_tensors(sums_file), {}
            for name, width in widths.items():
                shapes = {f"{name}.{i}": block for i, block in enumerate(block_shapes(width))}
                own = {part: tensor for part, tensor in sealed.tensors.items() if part in shapes}
                totals[name] = Triangle(_check_blocks(own, shapes, "float64"))
            count, following = (parse_json(Count, sealed.metadata.get(part, "")) for part in ("count", "following"))
            _log.info("going on behind %d tokens that an earlier run read", count)
            return totals, count, following
        except (OSError, FormatError) as error:
            _log.warning("%s is broken (%s); the text is read from its beginning", sums_file, explain(error))
    return {}, 0, 0


def _batches(lm: LM, texts: Iterator[str], tokens: int) -> Iterator[list[EncodedText]]:
    """The texts as batches of rows, until `tokens` tokens are read."""
    rows: list[EncodedText] = []
    around = lm.tokenizer("")["input_ids"]  # what the tokenizer puts before and behind a text
    for text in texts:
        (row,) = encode(lm.tokenizer, [Text(text)])  # general text is no chat
        # What begins a text begins every row of it: a model that is used to such a token is lost without.
        begin = tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(row.ids, around, strict=False)))
        width = max(1, min(_ROW_TOKENS, lm.max_tokens or _ROW_TOKENS) - len(begin))
        for start in range(len(begin), max(len(row.ids), len(begin) + 1), width):
            ids = (begin + row.ids[start : start + width])[:tokens]
            tokens -= len(ids)
            rows.append(EncodedText(ids, len(ids)))
            if len(rows) == _ROWS or not tokens:
                yield rows
                rows = []
            if not tokens:
                return
    if rows:
        yield rows
