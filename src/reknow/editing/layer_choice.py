"""Which layer to edit, when the user names none: what trial edits gave for this model, or else a guess.

Trial edits (`layer_trials`, `reknow layers`) take minutes and are made when they are asked for. What they gave is
kept in `layers.json` in the cache folder, may be put beside a model's weights as `reknow-layers.json`, and is shipped
for the bundled models. Where there is none, the layer is the one that a paper edited in models of this shape, or one
at a depth (`papers_layers`): on models that others trained it scores as trial edits' choice does (docs/log.md).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

from pydantic import JsonValue, ValidationError

from reknow.editing.papers_layers import papers_layers
from reknow.errors import InputError
from reknow.files.atomic import write_text
from reknow.files.cache import cache_folder, warn_if_unwritable
from reknow.files.locks import PATIENCE, write_lock
from reknow.files.schema import Count, FormatError, Listed, Strict, explain, first_problem, parse_json
from reknow.files.strict_json import strict_json
from reknow.lm import LM
from reknow.model.exclusive import exclusively
from reknow.published import published_layers

__all__ = [
    "BESIDE",
    "FILE",
    "LayerScore",
    "best_score",
    "is_guess",
    "keep_scores",
    "measured_layer",
    "read_scores",
    "suggest_layer",
    "write_scores",
]

_log = logging.getLogger(__name__)

FILE = "layers.json"
"""In the cache folder: the layers of all models that were tried here."""
BESIDE = "reknow-layers.json"
"""In a model's own folder: what its owner hands on with it."""


@dataclass(frozen=True)
class LayerScore:
    """What trial edits at one layer gave; rates are exact, teacher-forced, means over the facts."""

    layer: int
    effect: float
    """Average indirect effect of the MLP window around it at the subject's last token."""
    reliability: float
    generalization: float
    locality: float

    @property
    def score(self) -> float:
        """Harmonic mean of the three rates."""
        return harmonic_mean([self.reliability, self.generalization, self.locality])


def best_score(scores: Sequence[LayerScore]) -> LayerScore:
    """The highest score; between equals that of the layer which traces as more effective."""
    return max(scores, key=lambda layer: (layer.score, layer.effect))


@exclusively
def suggest_layer(lm: LM) -> int:
    """The layer whose trial edits scored best on the base model, or the first of `papers_layers` where none were
    made; whatever is applied to it."""
    return lm.cached(("layer",), lambda: _choose(lm))


def _choose(lm: LM) -> int:
    measured = measured_layer(lm)
    if measured is not None:
        return measured
    layer = papers_layers(lm)[0]
    by = "a guess by depth" if is_guess(lm) else "that of a paper"
    _log.info("layer %d of %s is %s: reknow layers makes trial edits", layer, lm.name, by)
    return layer


@exclusively
def is_guess(lm: LM) -> bool:
    """Whether `suggest_layer` is a guess by depth: nothing was measured, and no paper edited models of this shape."""
    return measured_layer(lm) is None and not published_layers("rome", lm)


@exclusively
def measured_layer(lm: LM) -> int | None:
    """The layer whose trial edits scored best; None where none were made."""
    if lm.layers == 1:
        return 0
    for file in (cache_folder() / FILE, Path(lm.name) / BESIDE, files("reknow") / "assets" / FILE):
        entry = _entry(lm, _read(file))
        if entry is not None and entry["layer"] < lm.layers:
            return entry["layer"]
    return None


def keep_scores(lm: LM, scores: Sequence[LayerScore]) -> None:
    """Keeps what trial edits gave in the cache folder: `suggest_layer` goes by it from now on."""
    cache, digest = cache_folder() / FILE, lm.fingerprint.digest
    with warn_if_unwritable(), write_lock(cache, wait=PATIENCE):
        others = {key: entry for key, entry in _read(cache).items() if not _is_of(digest, key)}
        write_text(cache, strict_json({**others, digest: _as_entry(lm, scores)}, indent=1))
    lm.memo[("layer",)] = best_score(scores).layer


def write_scores(lm: LM, scores: Sequence[LayerScore], file: Path) -> None:
    """Writes what trial edits gave into a file that `read_scores` reads, on this machine or another."""
    write_text(file, strict_json({lm.fingerprint.digest: _as_entry(lm, scores)}, indent=1) + "\n")


def read_scores(lm: LM, file: Path) -> list[LayerScore]:
    """What a file says of this model.

    Raises:
        InputError: there is no such file, or it holds nothing of these weights in this dtype.
    """
    if not file.is_file():
        raise InputError(
            f"expected a file of trial edits; there is none at {file}: check the path, or make them with reknow "
            "layers --out FILE"
        )
    known = _read(file)
    entry = _entry(lm, known)
    try:
        scores = [LayerScore(**trial) for trial in entry["trials"]] if entry else []
    except TypeError:
        scores = []
    if not scores:
        others = ", ".join(sorted({entry["model"] for entry in known.values()})) or "nothing"
        raise InputError(
            f"expected trial edits of {lm.name}, as it is opened, in {file}; by fingerprints it has {others}: make "
            f"them with reknow layers --out {file}"
        )
    return scores


def _as_entry(lm: LM, scores: Sequence[LayerScore]) -> dict[str, Any]:
    return {"layer": best_score(scores).layer, "model": lm.name, "trials": [asdict(score) for score in scores]}


def _entry(lm: LM, known: Mapping[str, dict]) -> dict | None:
    """What trial edits gave for this model; the last, where several were kept. Guesses, which former versions kept
    too, have no trials."""
    digest = lm.fingerprint.digest
    own = [entry for key, entry in known.items() if _is_of(digest, key) and entry["trials"]]
    return own[-1] if own else None


def _is_of(digest: str, key: str) -> bool:
    """Formerly a hash of the settings of the trials stood behind the model's."""
    return key.partition("-")[0] == digest


class _Choice(Strict):
    """What `layers.json` has for a model."""

    layer: Count
    model: str
    trials: Listed[dict[str, JsonValue]]


def _read(file) -> dict[str, dict]:
    """The choices in the file, none where there is none; what is broken is left out with a warning."""
    if not file.is_file():
        return {}
    try:
        entries = parse_json(dict[str, JsonValue], file.read_bytes())
    except (OSError, FormatError) as error:
        _log.warning("%s is broken and is not read: %s", file, explain(error))
        return {}
    known = {}
    for key, entry in entries.items():
        try:
            known[key] = _Choice.model_validate(entry).model_dump()
        except ValidationError as error:
            _log.warning("%s: the layer of %s is not read: %s", file, key, first_problem(error))
    return known
