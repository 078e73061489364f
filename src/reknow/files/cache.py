"""The cache folder: where statistics of models are kept, how large they are, and what makes room for new ones; and
models that were converted.

A covariance takes 2 · width² bytes, 0.7 GB for 18,944 inputs. The files of statistics together stay below a bound
(`REKNOW_CACHE_GB`); where a new one would pass it, those that were used longest ago are removed.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from reknow.errors import InputError

_log = logging.getLogger(__name__)

MODELS = "models"
"""The folder in it that holds models converted from other formats; the bound does not count them."""
CONVERTED = "all, converted"
"""What stands for the matrix of such a model."""
_BOUND_GB = 20.0
"""How much the files of statistics take together, unless `REKNOW_CACHE_GB` says otherwise."""
_RUNNING = "sums"
"""How the names of running sums begin, which a later run takes up."""
_IN_USE_SECONDS = 3600.0
"""A running sum that was written since then belongs to a process that reads."""


def cache_folder() -> Path:
    """Where statistics are kept: `$REKNOW_CACHE`, or `~/.cache/reknow`."""
    return Path(os.environ.get("REKNOW_CACHE") or Path.home() / ".cache" / "reknow")


@contextmanager
def warn_if_unwritable() -> Iterator[None]:
    """While open, something that was computed is written into the cache; where that fails, a warning says so."""
    try:
        yield
    except InputError as error:
        warnings.warn(
            f"{str(error).partition(';')[0]}: what was computed is used but not kept; let REKNOW_CACHE name a folder "
            "that can be written to",
            stacklevel=4,
        )


def cache_limit() -> float:
    """How many bytes the files of statistics may take together: `$REKNOW_CACHE_GB`, or 20 GB.

    Raises:
        InputError: it is no number from 0 on.
    """
    given = os.environ.get("REKNOW_CACHE_GB") or _BOUND_GB
    try:
        size = float(given)
    except ValueError:
        size = math.nan
    if not size >= 0:
        raise InputError(f"expected REKNOW_CACHE_GB as a number of gigabytes, 0 or more; got {given!r}: correct it")
    return size * 1e9


@dataclass(frozen=True)
class StatisticsFile:
    """One file of statistics, or the folder of a converted model."""

    file: Path
    model: str
    """Its name when the file was made; empty where the file does not say."""
    matrix: str
    """Its name in the model; `CONVERTED` for a whole model."""
    tokens: int
    """Of general text that were read; 0 for a model."""
    size: int
    """Bytes."""
    used: float
    """When it was last made or read, in seconds since 1970."""


def statistics_files() -> list[StatisticsFile]:
    """The files of statistics in the cache folder, those used longest ago first; running sums are among them."""
    files = []
    for file in cache_folder().glob("*.safetensors"):
        try:
            status, about = file.stat(), _read_metadata(file)
            tokens = int(about.get("read", about.get("count", 0)))
        except (OSError, ValueError):  # another process removed it, or it is damaged
            continue
        matrix = about.get("matrix", "running sum")
        files.append(StatisticsFile(file, about.get("name", ""), matrix, tokens, status.st_size, status.st_mtime))
    return sorted(files, key=lambda each: (each.used, each.file.name))


def _read_metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(str(file), "pt") as opened:
            return opened.metadata() or {}
    except SafetensorError:
        return {}


def converted_models() -> list[StatisticsFile]:
    """The models that were converted, by name, each a folder."""
    found = []
    for folder in sorted((cache_folder() / MODELS).glob("[!.]*")):
        try:
            size, used = sum(file.stat().st_size for file in folder.iterdir()), folder.stat().st_mtime
        except OSError:  # another process removed it
            continue
        found.append(StatisticsFile(folder, folder.name.rpartition("-")[0], CONVERTED, 0, size, used))
    return found


def mark_used(file: Path) -> None:
    """Notes that the file is used now; where it belongs to someone else it just grows old."""
    try:
        os.utime(file)
    except OSError:
        _log.debug("%s could not be marked as used", file)


def evict(using: Collection[Path] = ()) -> list[StatisticsFile]:
    """Removes files of statistics, those used longest ago first, until all together are within the bound.

    Args:
        using: files that stay, whatever their size; so do sums that another process is adding to.

    Returns:
        what was removed.
    """
    everything, limit = statistics_files(), cache_limit()
    total, removed = sum(each.size for each in everything), []
    for each in everything:
        running = each.file.name.startswith(_RUNNING) and time.time() - each.used < _IN_USE_SECONDS
        if total <= limit:
            break
        if each.file not in using and not running and _remove(each.file):
            total -= each.size
            removed.append(each)
    if removed:
        _log.info(
            "removed %d files of statistics to stay within %.3g GB (REKNOW_CACHE_GB)", len(removed), limit / 1e9
        )
    return removed


def clear_cache() -> list[StatisticsFile]:
    """Removes all files of statistics and all converted models, and says which; layers that were chosen stay."""
    return [each for each in (*statistics_files(), *converted_models()) if _remove(each.file)]


def _remove(file: Path) -> bool:
    """Removes the file or folder; False where it cannot be, as on Windows while a process reads it."""
    try:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    except OSError as error:
        _log.warning("%s could not be removed (%s)", file, error.strerror)
        return False
    return True
