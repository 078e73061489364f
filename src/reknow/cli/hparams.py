"""EasyEdit's files of hyperparameters (zjunlp/EasyEdit 14cea82, hparams/) as a method and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from reknow.errors import InputError, did_you_mean
from reknow.published import code_settings

ENDINGS = (".yaml", ".yml")

_ROWS = {"ROME": "rome", "R-ROME": "r-rome", "MEMIT": "memit", "AlphaEdit": "alphaedit", "FT": ""}
"""alg_name → row of the table of methods; FT's stands in its objective."""
_FT = {"prompt_last": "ft-l", "target_new": "ft-m"}
_SEARCH = {
    "v_num_grad_steps": "steps",
    "v_lr": "learning_rate",
    "v_weight_decay": "weight_decay",
    "clamp_norm_factor": "clamp",
    "kl_factor": "kl_weight",
}
_TUNING = {"layers": "layer", "num_steps": "steps", "lr": "learning_rate", "norm_constraint": "clamp"}
_FIELDS = {
    "rome": {**_SEARCH, "layers": "layer"},
    "r-rome": {**_SEARCH, "layers": "layer"},
    "memit": {**_SEARCH, "layers": "layers", "mom2_update_weight": "covariance_weight"},
    "alphaedit": {**_SEARCH, "layers": "layers", "nullspace_threshold": "null_threshold", "L2": "l2"},
    "ft-l": _TUNING,
    "ft-m": {**_TUNING, "batch_size": "batch_size"},
}
"""Row → their field → ours."""
_WANTED: dict[str, Any] = {"fact_token": "subject_last", "layer_selection": "all"}
_WANTED_OF_TUNING: dict[str, Any] = {"weight_decay": 0, "kl_factor": 0}
"""Fields that no field of ours stands for, with the only value that is taken."""
_FIRST_WORDS = ["The", "Therefore", "Because", "I", "You"]
"""With which the contexts of its ROME begin, each text's first token."""
_UNUSED = frozenset(
    {"alg_name", "model_name", "stats_dir", "P_loc", "device", "model_parallel", "fp16", "max_length", "batch_size"}
    | {"mom2_dataset", "mom2_n_samples", "mom2_dtype", "mom2_adjustment", "mom2_update_weight", "v_loss_layer"}
    | {"objective_optimization", "context_template_length_params"}
)
"""Where files lie, what computes, and what a method's code there does not read or is read by itself below."""
_MODULES = ("_tmp", "_module")
"""Ends of fields that name a model's modules, which are found here by its structure."""


def read_hparams(file: str | Path) -> tuple[str, dict[str, Any]]:
    """(row of the table of methods, settings) of a file of hyperparameters for ROME, R-ROME, MEMIT, AlphaEdit or FT.

    What the code there sets for every model is part of them, as in `published(row, source="easyedit")`. Not taken
    over are the text that its covariance is of (`covariance_text`, `covariance_tokens`), the precision, and
    `v_loss_layer`: the loss is read behind the last layer.

    Raises:
        InputError: the file cannot be read or is of another method; or a field has no counterpart.
    """
    fields = _read(file)
    row = _row(file, fields)
    known, settings = _FIELDS[row], code_settings(row)
    wanted = _WANTED_OF_TUNING if row in _FT.values() else _WANTED
    for name, value in fields.items():
        if name in known:
            settings[known[name]] = _value(known[name], value)
        elif name in wanted:
            if value != wanted[name]:
                _refuse(file, f"{name}: {wanted[name]!r}, as all else is not done here", repr(value))
        elif name not in _UNUSED and not name.endswith(_MODULES):
            raise InputError(f"{file}: {did_you_mean('field to take over', name, [*known, *wanted])}")
    if row in ("rome", "r-rome"):
        if not fields.get("mom2_adjustment", False):
            settings["covariance_tokens"] = 0  # C is the identity
        if lengths := fields.get("context_template_length_params"):
            # The first of a text's tokens is one of these words.
            settings["context_groups"] = [[count, length - 1] for length, count in lengths]
        settings["context_first_words"] = list(_FIRST_WORDS)
    return row, settings


def _read(file: str | Path) -> dict[str, Any]:
    import yaml

    try:
        fields = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        _refuse(file, "EasyEdit's hyperparameters as YAML", " ".join(str(error).split()))
    if not isinstance(fields, dict) or "alg_name" not in fields:
        _refuse(file, "EasyEdit's hyperparameters with alg_name", "none")
    return {str(name): _number(value) for name, value in fields.items()}


def _number(value: Any) -> Any:
    """Numbers such as 5e-1, which YAML takes for texts."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _row(file: str | Path, fields: Mapping[str, Any]) -> str:
    algorithm = fields["alg_name"]
    if algorithm not in _ROWS:
        raise InputError(f"{file}: {did_you_mean('alg_name to take over', str(algorithm), _ROWS)}")
    if algorithm != "FT":
        return _ROWS[algorithm]
    objective = fields.get("objective_optimization")
    return (
        _FT[objective] if objective in _FT else _refuse(file, f"objective_optimization {' or '.join(_FT)}", objective)
    )


def _value(field: str, value: Any) -> Any:
    """A value as our field has it."""
    if field == "layer" and isinstance(value, list) and len(value) == 1:
        return value[0]
    return None if field == "clamp" and value is False else value


def _refuse(file: str | Path, expected: str, got: Any) -> NoReturn:
    raise InputError(f"expected {expected} in {file}; got {got}: correct the file, or give the settings with --set")
