"""EasyEdit's files of hyperparameters (zjunlp/EasyEdit 14cea82, hparams/) as a method and its settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from reknow.errors import InputError, did_you_mean
from reknow.published import code_settings

ENDINGS = (".yaml", ".yml")

_FT = {"prompt_last": "ft-l", "target_new": "ft-m"}
_SEARCH = {
    "v_num_grad_steps": "steps",
    "v_lr": "learning_rate",
    "v_weight_decay": "weight_decay",
    "clamp_norm_factor": "clamp",
    "kl_factor": "kl_weight",
}
_ONE_LAYER, _BAND = {**_SEARCH, "layers": "layer"}, {**_SEARCH, "layers": "layers"}
_TUNING = {"layers": "layer", "num_steps": "steps", "lr": "learning_rate", "norm_constraint": "clamp"}
_BESIDE = {"inner_params": "layer", "edit_lr": "learning_rate", "n_iter": "steps"}
_WISE = {
    **_BESIDE,
    "norm_constraint": "clamp",
    "mask_ratio": "mask_ratio",
    "densities": "density",
    "save_freq": "shard_size",
    "act_ratio": "threshold",
}
_REPLACEMENTS = {"replace_last": "last", "replace_prompt": "before"}

_SUBJECT: dict[str, Any] = {"fact_token": "subject_last", "layer_selection": "all"}


class _Form(NamedTuple):
    """What the fields of a method's files become."""

    row: str
    fields: Mapping[str, str]
    """Theirs → ours."""
    wanted: Mapping[str, Any]
    """Fields that no field of ours stands for, with the only value that is taken."""


_FORMS = {
    "ROME": _Form("rome", _ONE_LAYER, _SUBJECT),
    "R-ROME": _Form("r-rome", _ONE_LAYER, _SUBJECT),
    "MEMIT": _Form("memit", {**_BAND, "mom2_update_weight": "covariance_weight"}, _SUBJECT),
    "PMET": _Form("pmet", {**_BAND, "mom2_update_weight": "covariance_weight"}, {**_SUBJECT, "nll_loss_factor": 1}),
    "EMMET": _Form(
        "emmet",
        {**_ONE_LAYER, "mom2_update_weight": "covariance_scale", "emmet_lambda": "ridge"},
        {**_SUBJECT, "update_norm_lambda": 0},
    ),
    "AlphaEdit": _Form("alphaedit", {**_BAND, "nullspace_threshold": "null_threshold", "L2": "l2"}, _SUBJECT),
    "FT": _Form("", _TUNING, {"weight_decay": 0, "kl_factor": 0}),
    "GRACE": _Form(
        "grace",
        {**_BESIDE, "eps": "epsilon", "replacement": "replacement"},
        {
            **{"dist_fn": "euc", "val_init": "cold", "val_train": "sgd", "val_reg": "None", "reg": "early_stop"},
            **{"eps_expand": "coverage", "dropout": 0},
        },
    ),
    "DEFER": _Form("defer", {**_BESIDE, "threshold": "threshold"}, {}),
    "WISE": _Form(
        "wise",
        _WISE,
        {"merge_alg": "ties", "objective_optimization": "only_label", "weights": 1, "replay": False},
    ),
}
"""alg_name → form; FT's row stands in its objective, WISE's in `retrieve`."""
_FIRST_WORDS = ["The", "Therefore", "Because", "I", "You"]
"""With which the contexts of its ROME begin, each text's first token."""
_UNUSED = frozenset(
    {"alg_name", "model_name", "stats_dir", "P_loc", "device", "model_parallel", "fp16", "max_length", "batch_size"}
    | {"mom2_dataset", "mom2_n_samples", "mom2_dtype", "mom2_adjustment", "mom2_update_weight", "v_loss_layer"}
    | {"objective_optimization", "context_template_length_params", "num_pert", "act_margin", "retrieve"}
    | {"merge_freq", "use_chat_template", "save_path", "load_path"}
)
"""Where files lie, what computes, and what a method's code there does not read or is read by itself below."""
_MODULES = ("_tmp", "_tmps", "_module")
"""Ends of fields that name a model's modules, which are found here by its structure."""
_SITES = {
    "value": ("down_proj", "c_proj", "fc_out", "fc2", "dense_4h_to_h", "w2"),
    "mlp_in": ("c_fc", "fc_in", "fc1", "dense_h_to_4h", "up_proj", "gate_proj", "w1", "w3"),
}
"""GRACE's `site` by the name of the matrix."""


def read_hparams(file: str | Path) -> tuple[str, dict[str, Any]]:
    """(row of the table of methods, settings) of a file of hyperparameters of the methods in `_FORMS`.

    What the code there sets for every model is part of them, as in `published(row, source="easyedit")`. Not taken
    over are the text that its covariance is of (`covariance_text`, `covariance_tokens`), the precision, whether a
    chat template is used, and `v_loss_layer`: the loss is read behind the last layer. Of `inner_params` the layer is,
    and for GRACE which of the MLP's matrices it is: other memories stand at the value matrix.

    Raises:
        InputError: the file cannot be read or is of another method; or a field has no counterpart.
    """
    fields = _read(file)
    form = _form(file, fields)
    settings = code_settings(form.row)
    for name, value in fields.items():
        if name in form.fields:
            settings[form.fields[name]] = _value(file, form.fields[name], value)
        elif name in form.wanted:
            if value != form.wanted[name]:
                _refuse(file, f"{name}: {form.wanted[name]!r}, as all else is not done here", repr(value))
        elif name not in _UNUSED and not name.endswith(_MODULES):
            raise InputError(f"{file}: {did_you_mean('field to take over', name, [*form.fields, *form.wanted])}")
    if form.row in ("rome", "r-rome"):
        if not fields.get("mom2_adjustment", False):
            settings["covariance_tokens"] = 0  # C is the identity
        if lengths := fields.get("context_template_length_params"):
            # The first of a text's tokens is one of these words.
            settings["context_groups"] = [[count, length - 1] for length, count in lengths]
        settings["context_first_words"] = list(_FIRST_WORDS)
    if form.row == "grace" and "inner_params" in fields:
        settings["site"] = _site(file, fields["inner_params"])
    if margins := fields.get("act_margin"):
        settings |= dict(zip(("alpha", "beta", "gamma"), margins, strict=True))
    return form.row, settings


def _site(file: str | Path, modules: Any) -> str:
    """Beside which matrix of the MLP GRACE stands, by its name."""
    if isinstance(modules, list) and len(modules) == 1 and "attn" not in (name := str(modules[0])):
        last = name.removesuffix(".weight").rpartition(".")[2]
        for site, ends in _SITES.items():
            if last in ends:
                return site
    _refuse(file, "one matrix of an MLP as inner_params", repr(modules))


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


def _form(file: str | Path, fields: Mapping[str, Any]) -> _Form:
    algorithm = fields["alg_name"]
    if algorithm not in _FORMS:
        raise InputError(f"{file}: {did_you_mean('alg_name to take over', str(algorithm), _FORMS)}")
    form = _FORMS[algorithm]
    if algorithm == "FT":
        objective = fields.get("objective_optimization")
        if objective not in _FT:
            _refuse(file, f"objective_optimization {' or '.join(_FT)}", objective)
        more = {"batch_size": "batch_size"} if objective == "target_new" else {}
        return form._replace(row=_FT[objective], fields={**form.fields, **more})
    return form._replace(row="wise-retrieve") if algorithm == "WISE" and fields.get("retrieve") else form


def _value(file: str | Path, field: str, value: Any) -> Any:
    """A value as our field has it."""
    if field == "layer" and isinstance(value, list) and len(value) == 1:
        return _layer_of(file, value[0]) if isinstance(value[0], str) else value[0]
    if field == "replacement":
        if value not in _REPLACEMENTS:
            _refuse(file, f"replacement {' or '.join(_REPLACEMENTS)}", value)
        return _REPLACEMENTS[value]
    return None if field == "clamp" and value is False else value


def _layer_of(file: str | Path, matrix: str) -> int:
    """The number in the name of a matrix."""
    numbers = re.findall(r"(?<![a-z\d])\d+(?![a-z\d])", matrix)
    return (
        int(numbers[0]) if len(numbers) == 1 else _refuse(file, "inner_params with the matrix of one layer", matrix)
    )


def _refuse(file: str | Path, expected: str, got: Any) -> NoReturn:
    raise InputError(f"expected {expected} in {file}; got {got}: correct the file, or give the settings with --set")
