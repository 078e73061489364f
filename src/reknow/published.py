"""What papers set for the models that they edited, method by method: the tables of `assets/published.toml`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

from reknow.checks.arguments import typed
from reknow.errors import InputError
from reknow.model.decoder import Decoder
from reknow.model.parts import shape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

__all__ = [
    "Published",
    "code_settings",
    "holds_for_any",
    "published",
    "published_layers",
    "published_models",
    "published_sources",
]

_Table = Mapping[str, Any]

_ABOUT = {"models", "by", "like", "complete", "training", "source", "note"}
"""Keys of a table that are no fields of the method."""
_IN_PLACE_OF = {
    "regularization": ("covariance_weight", "l2", "ridge"),
    "null_share": ("null_threshold",),
    "leakage": ("leakage_weight",),
}
"""Setting in the model's own units → the plain numbers that papers have, and that are read in its place."""


class Published(NamedTuple):
    """The settings that a paper, or its authors' code, has for a method and a model."""

    row: str
    """Name in the table of methods."""
    model: str | None
    """Name of the model; None: the same settings hold for all."""
    settings: dict[str, Any]
    """Fields of the method; any other field is as by default."""
    training: dict[str, Any]
    """Fields of `Training`, where the method learns to edit."""
    sources: tuple[str, ...]
    """Repository, commit and files, those of this model first."""
    notes: tuple[str, ...]
    """What the method cannot be told, and what else is to be known."""

    @property
    def source(self) -> str:
        return "; ".join(self.sources)

    def settings_with(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings, and those that are given over them: instead of the plain numbers that would be read first."""
        replaced = {number for field in given for number in _IN_PLACE_OF.get(field, ()) if number not in given}
        return {name: value for name, value in self.settings.items() if name not in replaced} | dict(given)


@typed
def published(row: str, model: Decoder | str | None = None, source: str | None = None) -> Published:
    """What is published for the method `row`, a name in the table of methods.

    That is what the code of the paper's authors sets where it has the model, else EasyEdit's, else that of another
    paper whose baseline the method was; `sources` says which. `notes` say what no field can: that C of ROME and its
    like is of 100,000 articles there, say, while `covariance_tokens` stays at our default, 100,000 tokens at most.

    Args:
        model: its name, or an LM, which is recognised by its sizes and never by its name; None: where the same holds
            for all models.
        source: part of the name of a repository, as `easyedit`, whose settings are wanted; None: the authors', or
            those that there are.

    Raises:
        InputError: nothing is published for this method, for this model or by this source.
    """
    name = _model_name(row, model)
    every = [table for table in _tables(row) if name in table.get("models", [name])]
    source = source and source.lower()
    tables = [table for table in every if "by" not in table or (source and table["by"] in source)]
    specific = [table for table in tables[::-1] if {"models", "by"} & set(table)]
    own = [table for table in specific if "source" in table] or tables
    if source is not None and not any(source in table.get("source", "").lower() for table in own):
        raise InputError(
            f"expected a source of {row}'s settings for {name or 'all models'}; got {source}: there are "
            f"{'; '.join(_texts(every[::-1], 'source', name))}"
        )
    settings = _fields(tables)
    training = {key: value for table in tables for key, value in table.get("training", {}).items()}
    notes = {topic: text for table in tables for topic, text in table.get("note", {}).items()}
    sources = _texts([*specific, *tables], "source", name)
    return Published(row, name, settings, training, sources, tuple(filter(None, notes.values())))


def code_settings(row: str) -> dict[str, Any]:
    """What the code of a published method sets for every model, as far as the tables have it."""
    return _fields([table for table in _tables(row) if not {"models", "by"} & set(table)])


def holds_for_any(row: str) -> bool:
    """Whether there are settings for this method that hold for a model without some of its own."""
    tables = _tables(row)
    return bool(tables) and (not published_models(row) or any("complete" in table for table in tables))


def published_models(row: str) -> list[str]:
    """The models that have settings of their own for this method."""
    named = {model for table in _tables(row) for model in table.get("models", ())}
    return [model for model in _contents()["models"] if model in named]


def published_sources(row: str, model: str | None) -> list[str]:
    """What else may be asked for as the source of the settings for this method and model."""
    tables = [table for table in _tables(row) if model in table.get("models", [model])]
    return list(dict.fromkeys(table["by"] for table in tables if "by" in table))


def published_layers(row: str, lm: Decoder) -> list[int]:
    """The layers that a paper edited with this method in models of these sizes; none where no paper did."""
    for name in _same_sizes(lm):
        if name in published_models(row):
            settings = published(row, name).settings
            return settings["layers"] if "layers" in settings else [settings["layer"]]
    return []


@lru_cache
def _contents() -> dict[str, Any]:
    return tomllib.loads((files("reknow") / "assets" / "published.toml").read_text(encoding="utf-8"))


def _tables(row: str, absent: bool = False) -> list[_Table]:
    """The tables of a method, with those that they refer to; or those that say what is absent, and why."""
    found = []
    for table in _contents().get(row, ()):
        found += _tables(table["like"], absent) if "like" in table else []
        found += [table] if ("absent" in table) == absent else []
    return found


def _fields(tables: Sequence[_Table]) -> dict[str, Any]:
    """The fields of a method in the tables; a later one goes over an earlier one. TOML has no null."""
    fields = {key: value for table in tables for key, value in table.items() if key not in _ABOUT}
    return {key: None if value == "none" else deepcopy(value) for key, value in fields.items()}


def _model_name(row: str, model: Decoder | str | None) -> str | None:
    """The model's name where there are settings for it; None where those for all models hold.

    Raises:
        InputError: neither.
    """
    given, own = _names(model), published_models(row)
    for name in given:
        if name in own:
            return name
    if holds_for_any(row):
        return None
    reasons = [table["absent"] for table in _tables(row, absent=True) if set(given) & set(table["models"])]
    shown = "none" if model is None else model if isinstance(model, str) else model.name
    shown += "".join(f" ({reason})" for reason in reasons)
    if not own:
        raise InputError(
            f"expected a method with published settings; got {row}, model {shown}: set its fields yourself"
        )
    raise InputError(
        f"expected a model for which settings of {row} are published, which are {', '.join(own)}; got {shown}: name "
        "one of them, or set the fields yourself"
    )


def _names(model: Decoder | str | None) -> list[str]:
    """The names in our tables that the model may have."""
    if model is None:
        return []
    contents = _contents()
    if isinstance(model, str):
        wanted = model.rpartition("/")[2].lower()
        return [name for name in contents["models"] if wanted in (name, *contents["other_names"].get(name, ()))]
    positions = {None, model.max_tokens}
    return [name for name in _same_sizes(model) if contents["models"][name].get("positions") in positions]


def _same_sizes(lm: Decoder) -> list[str]:
    """The names in our tables of models with its type, layers and widths."""
    kind = lm.model.config.get_text_config(decoder=True).model_type
    inner = shape(lm.model.get_submodule(lm.parts.value[0]))[1]
    sizes = [kind, lm.layers, lm.parts.hidden_size, inner]
    return [name for name, about in _contents()["models"].items() if about["sizes"] == sizes]


def _texts(tables: Sequence[_Table], key: str, model: str | None) -> tuple[str, ...]:
    """What the tables have under the key, each text once."""
    file = _contents()["models"].get(model, {}).get("easyedit", "*")
    return tuple(dict.fromkeys(table[key].replace("{easyedit}", file) for table in tables if key in table))
