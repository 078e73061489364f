"""A method's fields on the command line: read by type, explained by the docstrings under them."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from reknow.checks.bounds import convert, field_types, former_names, layer_field
from reknow.cli.hparams import ENDINGS, read_hparams
from reknow.contract import Method
from reknow.errors import InputError, did_you_mean
from reknow.registry import find_row, make


def build_method(
    name: str, pairs: Sequence[str] = (), *, layer: str | None = None, given: Mapping[str, Any] = {}
) -> Method:
    """The method `name` with settings given as `field=value`; of two for one field the later one holds.

    Args:
        name: of the table of methods, or a file of EasyEdit's hyperparameters, by its ending.
        layer: `3`, `3,4,5` or `auto`, for whichever field of the method it is.
        given: settings that hold where `pairs` have no other.

    Raises:
        InputError: unknown method or field, a value that the field cannot have, or a layer that is given twice.
    """
    if name.endswith(ENDINGS):
        name, own = read_hparams(name)
        given = {**own, **given}
    kind = find_row(name).method
    known, former = field_types(kind), former_names(kind)
    if layer is not None:
        field = layer_field(kind) or "layer"  # a method without any refuses it by that name
        if any(pair.partition("=")[0] == field for pair in pairs):
            raise InputError(f"expected the layer once; got both --layer and --set {field}: leave one out")
        pairs = [*pairs, f"{field}={layer}"]
    values: dict[str, Any] = {}
    for key, equals, text in (pair.partition("=") for pair in pairs):
        if not equals:
            raise InputError(f"expected --set FIELD=VALUE; got {key!r}: see `reknow methods {name}`")
        if key in former:
            field, mark = former[key]
            values[key] = read_value(key, text, bool if mark.values else known[field] | None)
        elif key in known:
            values[key] = read_value(key, text, known[key])
        else:
            raise did_you_mean(f"setting of {name}", key, known)
    renamed = {former[key][0] for key in values if key in former}
    return make(name, {key: value for key, value in given.items() if key not in renamed} | values)


def check_each_once(pairs: Sequence[str]) -> Sequence[str]:
    """The settings; raises InputError where a person gives one of them twice."""
    keys = [pair.partition("=")[0] for pair in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise InputError(f"expected --set {key} once; got it {keys.count(key)} times: keep one")
    return pairs


def read_value(name: str, text: str, hint: Any) -> Any:
    """The text as a value of the type `hint`: as JSON, as a list without its brackets, or as it stands.

    `none` and `auto` are None; items of a list have commas or spaces between them.

    Raises:
        InputError: the text is nothing of that type.
    """
    refused: list[InputError] = []
    for value in _readings(text):
        try:
            return convert(name, value, hint, repr(text))
        except InputError as error:
            refused.append(error)
    raise refused[0]


def _readings(text: str) -> Iterator[Any]:
    """What a person may mean by it, the most likely first: `1,2` is [1, 2], and [[1, 2]] where such are wanted."""
    words = {"none": None, "auto": None, "true": True, "false": False}
    if text.lower() in words:
        yield words[text.lower()]
    numbers = ",".join(text.replace(",", " ").split())
    for form in (text, f"[{numbers}]", f"[[{numbers}]]"):
        with suppress(ValueError, RecursionError):
            yield json.loads(form, parse_constant=_refused)
    yield text
    yield [part.strip() for part in text.split(",")]


def _refused(constant: str):
    """NaN and infinities, which JSON as Python reads it would have, are no value of any setting."""
    raise ValueError(constant)


def field_docs(method: type) -> dict[str, str]:
    """The docstring under each field of a class or of those that it inherits from, which only the source knows."""
    inherited = [field_docs(base) for base in method.__bases__ if is_dataclass(base)]
    body = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    assert isinstance(body, ast.ClassDef)
    own = {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }
    known = {field.name for field in fields(method)}
    return {name: text for docs in (*inherited, own) for name, text in docs.items() if name in known}
