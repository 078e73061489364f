"""The covariance of keys, C = E[k kᵀ], of the unedited model over general text (ROME, arXiv 2202.05262, eq. 2).

The text is read as a stream, every layer that is asked for in one pass, and the lower triangle of k kᵀ is summed in
float64, which takes 4 · in² bytes per layer; of very large ones in pairs of float32 and bfloat16, 3 · in² bytes
(`triangle.LARGE`). What was summed is written every half minute, and a killed run goes on there. The mean is kept in
float32.

First tokens of texts, attention sinks in many models, are part of it: their keys are huge, but of one direction. To
spare it costs nothing, and left out it would be changed most.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor

from reknow.checks.arguments import typed
from reknow.datasets.text import TextSource, text_source
from reknow.editing import triangle
from reknow.editing.by_expert import Covariance, bytes_kept, from_blocks, shapes
from reknow.editing.key_sums import BATCHES, ROW_TOKENS, Task, all_finite, check_blocks, save, sum_keys
from reknow.editing.moments import read_moment
from reknow.errors import EditFailed, InputError
from reknow.files.cache import cache_folder, cache_limit, evict, mark_used
from reknow.files.locks import write_lock
from reknow.files.schema import Count, FormatError, explain, parse_json
from reknow.files.tensors import read_tensors
from reknow.lm import LM
from reknow.model.exclusive import typed_exclusively
from reknow.model.parts import device_of, groups, shape

__all__ = ["Statistics", "covariance", "enough_tokens", "keep_statistics", "statistics"]

_log = logging.getLogger(__name__)

_FORMAT = 4
"""Counts up when the same settings give other statistics."""
_TOKENS_PER_INPUT, _MOST_TOKENS = 20, 100_000
"""From ten an input on edits of the bundled models score as with a hundred. By twenty an edit changes the outputs of
general text by a tenth more than the least that C of 100,000 tokens allows on SmolLM2 (docs/log.md)."""


@dataclass(frozen=True)
class Statistics:
    """C of one matrix, and where it is kept."""

    triangle: Covariance  # of (in, in), float32, on the device of the matrix
    tokens: int
    """How many tokens were read."""
    file: Path

    @property
    def covariance(self) -> Tensor:
        """C, (in, in), float32, on the device of the matrix."""
        return self.triangle.full()

    @property
    def sums(self) -> str:
        """How it was summed."""
        large = self.triangle.blocks[-1].shape[1] > triangle.LARGE
        return "float32 + bfloat16" if large else "float64"


def enough_tokens(lm: LM) -> int:
    """How many tokens of text C is read from unless told otherwise: twenty for each input of the widest value matrix,
    100,000 at most. The papers read 44 million."""
    return min(_MOST_TOKENS, _TOKENS_PER_INPUT * max(shape(lm.model.get_submodule(v))[1] for v in lm.parts.value))


@typed
def covariance(
    lm: LM, layer: int, *, tokens: int | None = None, text: str | Path | Sequence[str] | None = None
) -> Tensor:
    """C, the mean of k kᵀ over text tokens at the input of layer `layer`'s value matrix; see `statistics`.

    Returns:
        (in, in), float32, on the device of the matrix.
    """
    return statistics(lm, [layer], tokens=tokens, text=text)[layer].covariance


def covariance_triangle(lm: LM, layer: int, *, tokens: int | None = None, text: str | None = None) -> Covariance:
    """C as its lower triangle, half of what `covariance` gives; of a mixture as those of its experts."""
    return statistics(lm, [layer], tokens=tokens, text=text)[layer].triangle


@typed_exclusively
def statistics(
    lm: LM,
    layers: Sequence[int],
    *,
    tokens: int | None = None,
    text: str | Path | Sequence[str] | None = None,
    state: PartialState | None = None,
) -> dict[int, Statistics]:
    """Statistics of several layers with no patch applied, in one pass over the text.

    Kept on disk under all that they depend on: base model, matrix, text, number of tokens, dtype.

    Args:
        tokens: how many to read at most; None: `enough_tokens`.
        text: see `datasets.text.text_source`; None: the bundled WikiText sample.
        state: Accelerate's, where several processes call this together: each reads its share.

    Raises:
        InputError: no such layer; no tokens are to be read; the text is empty; they are not kept and
            `lm.computes_statistics` is off.
        EditFailed: the keys are not finite.
    """
    source, tokens, keys = _requested(lm, layers, tokens, text)
    found = {layer: kept for layer, key in keys.items() if (kept := _load(lm, key))}
    missing = [layer for layer in keys if layer not in found]
    if state is not None:  # another process may have another disk
        missing = sorted(set(gather_object(missing)))
    for some in _read_together(lm, missing):
        found |= _compute(lm, {layer: keys[layer] for layer in some}, source, tokens, state)
    return {layer: found[layer] for layer in keys}


@typed_exclusively
def keep_statistics(
    lm: LM, layers: Sequence[int], *, tokens: int | None = None, text: str | Path | Sequence[str] | None = None
) -> None:
    """Reads and keeps the statistics of those layers that have none yet, in one pass over the text.

    Arguments and errors as in `statistics`.
    """
    source, tokens, keys = _requested(lm, layers, tokens, text)
    missing = [layer for layer, key in keys.items() if not os.path.isfile(_file("covariance", key))]
    for some in _read_together(lm, missing):
        _compute(lm, {layer: keys[layer] for layer in some}, source, tokens, None)


def _requested(
    lm: LM, layers: Sequence[int], tokens: int | None, text: str | Path | Sequence[str] | None
) -> tuple[TextSource, int, dict[int, dict[str, str]]]:
    """The text to read, how many tokens of it, and by layer all that its statistics depend on."""
    tokens = enough_tokens(lm) if tokens is None else tokens
    if tokens < 1:
        raise InputError(f"expected at least one token to read for statistics; got {tokens}: raise it")
    source = text_source(text)
    names = {layer: lm.parts.value[lm.check_layer(layer)] for layer in dict.fromkeys(layers)}
    return source, tokens, {layer: _key(lm, name, source, tokens) for layer, name in names.items()}


def _read_together(lm: LM, missing: Sequence[int]) -> list[list[int]]:
    """The layers without statistics, in parts whose sums one pass over the text may hold: all, or on each GPU as many
    as fit into half of its free memory."""
    if missing and not lm.computes_statistics:
        numbers = ",".join(map(str, missing))
        raise InputError(
            f"expected kept statistics of layer {numbers} of {lm.name}; there are none of this text and size: "
            f"run reknow stats --layers {numbers} first, or leave --no-stats out"
        )
    if missing:
        cache_limit()  # a wrong one is refused before the work
    modules = [lm.model.get_submodule(lm.parts.value[layer]) for layer in missing]
    most = max((bytes_kept(shape(module)[1], groups(module)) for module in modules), default=1)
    parts, taken = defaultdict[int, list[int]](list), Counter[torch.device]()
    for layer in missing:
        device, room = lm.device_of(lm.parts.value[layer]), len(missing)
        if device.type == "cuda":
            room = max(1, int(torch.cuda.mem_get_info(device)[0] / 2 / (2 * most)))
        parts[taken[device] // room].append(layer)
        taken[device] += 1
    return list(parts.values())


def _key(lm: LM, name: str, source: TextSource, tokens: int) -> dict[str, str]:
    """All that the statistics of the matrix `name` depend on."""
    module = lm.model.get_submodule(name)
    large = groups(module) == 1 and shape(module)[1] > triangle.LARGE
    return {
        "format": f"{_FORMAT}, rows of {ROW_TOKENS}{', paired sums' if large else ''}",
        "model": lm.fingerprint.digest,
        "matrix": name,
        "text": source.digest,
        "tokens": str(tokens),
        "dtype": str(lm.dtype),
    }


def _file(kind: str, key) -> Path:
    return cache_folder() / f"{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.safetensors"


def _device(lm: LM, key: dict[str, str]) -> torch.device:
    """Where the matrix lies."""
    return device_of(lm.model.get_submodule(key["matrix"]), lm.device)


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
        blocks = check_blocks(sealed.tensors, _blocks(lm, key["matrix"]), "float32")
        count = parse_json(Count, sealed.metadata.get("read", ""))
    except (OSError, FormatError) as error:
        _log.warning("%s is broken and is made again: %s", file, explain(error))
        return None
    mark_used(file)
    return Statistics(from_blocks(blocks, _groups(lm, key["matrix"])).to(_device(lm, key)), count, file)


def _blocks(lm: LM, name: str) -> dict[str, tuple[int, int]]:
    """The tensors in the file of the matrix, with their shapes."""
    width = shape(lm.model.get_submodule(name))[1]
    return {f"covariance.{i}": block for i, block in enumerate(shapes(width, _groups(lm, name)))}


def _groups(lm: LM, name: str) -> int:
    return groups(lm.model.get_submodule(name))


def _compute(
    lm: LM, keys: dict[int, dict[str, str]], source: TextSource, tokens: int, state: PartialState | None
) -> dict[int, Statistics]:
    """The statistics, read from text and kept, or what another process has kept meanwhile."""
    _log.info("reading %d tokens of %s for the statistics of layers %s", tokens, source.name, list(keys))
    rank, world = (0, 1) if state is None else (state.process_index, state.num_processes)
    sums_file = _file("sums", [list(keys.values()), BATCHES, rank, world])
    with write_lock(sums_file, wait=math.inf):
        kept = {layer: one for layer, key in keys.items() if (one := _load(lm, key))}
        if world == 1 and len(kept) == len(keys):
            return kept
        if source.moments is not None:
            return {layer: _take_over(lm, key, source.moments) for layer, key in keys.items()}
        names = [key["matrix"] for key in keys.values()]
        totals, count = sum_keys(Task(lm, names, source, tokens, sums_file, rank, world))
        if world > 1:
            for total in totals.values():
                total.map(_add_up)
            count = int(_add_up(torch.tensor(count, device=lm.device)))
        if not count:
            raise InputError(
                f"expected text to read keys from; got none in {source.name}: give texts of at least one word"
            )
        found = {}
        for layer, key in keys.items():
            mean, file = totals.pop(key["matrix"]).mean(count), _file("covariance", key)
            if not all_finite(mean.blocks):
                _remove(sums_file)
                raise EditFailed(
                    f"expected finite keys; {lm.name} gives NaN or infinity at {key['matrix']}: try another dtype"
                )
            if state is None or state.is_local_main_process:
                save(mean.named("covariance"), file, key | {"read": str(count), "name": lm.name})
            # Where a device has no float64, it was summed elsewhere.
            found[layer] = Statistics(mean.to(_device(lm, key)), count, file)
        _remove(sums_file)
        evict(using=[one.file for one in found.values()])
        if state is not None:
            state.wait_for_everyone()
        return found


def _take_over(lm: LM, key: dict[str, str], folder: Path) -> Statistics:
    """What another program read, kept as our own is."""
    file, sizes = _file("covariance", key), _blocks(lm, key["matrix"]).values()
    mean, count = read_moment(folder, key["matrix"], max(columns for _, columns in sizes))
    taken = from_blocks([mean[end - rows : end, :end].float().contiguous() for rows, end in sizes], 1)
    save(taken.named("covariance"), file, key | {"read": str(count), "name": lm.name})
    evict(using=[file])
    return Statistics(taken.to(_device(lm, key)), count, file)


def _add_up(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors."""
    total = reduce(tensor, "sum")
    assert isinstance(total, Tensor)
    return total
