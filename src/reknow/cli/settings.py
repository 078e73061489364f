"""A method's fields on the command line: read by type, explained by the docstrings under them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from reknow.cli.hparams import ENDINGS, read_hparams
from reknow.contract import Method
from reknow.errors import InputError
from reknow.registry import layer_setting, make_from_text


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
    if layer is not None:
        field = layer_setting(name)
        if any(pair.partition("=")[0] == field for pair in pairs):
            raise InputError(f"expected the layer once; got both --layer and --set {field}: leave one out")
        pairs = [*pairs, f"{field}={layer}"]
    texts: dict[str, str] = {}
    for key, equals, text in (pair.partition("=") for pair in pairs):
        if not equals:
            raise InputError(f"expected --set FIELD=VALUE; got {key!r}: see `reknow methods {name}`")
        texts[key] = text
    return make_from_text(name, texts, given)


def check_each_once(pairs: Sequence[str]) -> Sequence[str]:
    """The settings; raises InputError where a person gives one of them twice."""
    keys = [pair.partition("=")[0] for pair in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise InputError(f"expected --set {key} once; got it {keys.count(key)} times: keep one")
    return pairs


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
