"""A method's fields on the command line: read by type, explained by the docstrings under them."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from reknow.errors import InputError, did_you_mean
from reknow.methods import METHODS
from reknow.methods.base import Method


def chosen_method(name: str, pairs: Iterable[str] = (), *, layer: str | None = None) -> Method:
    """The method `name` with settings given as `field=value`.

    Args:
        layer: `3`, `3,4,5` or `auto`, for whichever field of the method it is.

    Raises:
        InputError: unknown method or field, or a value that the field cannot have.
    """
    if name not in METHODS:
        raise did_you_mean("method", name, METHODS)
    entry = METHODS[name]
    hints = get_type_hints(entry.method)
    known = [field.name for field in fields(entry.method)]  # type: ignore[arg-type]
    if layer is not None:
        several = "layers" in known
        listed = layer != "auto" and (several or "," in layer)
        pairs = [*pairs, f"{'layers' if several else 'layer'}={f'[{layer}]' if listed else layer}"]
    values = dict(entry.settings)
    for key, equals, text in (pair.partition("=") for pair in pairs):
        if not equals:
            raise InputError(f"expected --set FIELD=VALUE; got {key!r}: see `reknow methods {name}`")
        if key not in known:
            raise did_you_mean(f"setting of {name}", key, known)
        values[key] = read_value(key, text, hints[key])
    return entry.method(**values)


def read_value(name: str, text: str, hint: Any) -> Any:
    """The text as a value of the type `hint`: JSON where it is that, else the text itself; `none` for None.

    Raises:
        InputError: the text is nothing of that type.
    """
    try:
        words = {"none": None, "auto": None, "true": True, "false": False}
        value = words[text.lower()] if text.lower() in words else json.loads(text, parse_constant=_refused)
    except ValueError:
        value = text
    for candidate in (value, text):
        try:
            return _fitted(candidate, hint)
        except TypeError:
            continue
    raise InputError(f"expected {name} as {shown_type(hint)}; got {text!r}: give a value of that form")


def _refused(constant: str):
    """NaN and infinities, which JSON as Python reads it would have, are no value of any setting."""
    raise ValueError(constant)


def _fitted(value: Any, hint: Any) -> Any:
    """The value in the type `hint`; raises TypeError where it does not fit."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for argument in arguments:
            try:
                return _fitted(value, argument)
            except TypeError:
                continue
    elif origin is Literal and value in arguments:
        return value
    elif origin is tuple and isinstance(value, list):
        inner = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(inner) == len(value):
            return tuple(_fitted(one, each) for one, each in zip(value, inner, strict=True))
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise TypeError


def shown_type(hint: Any) -> str:
    """A type in words: `int or none`, `one of a, b`, `[[int, int], …]`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(shown_type(argument) for argument in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"[{', '.join('…' if argument is ... else shown_type(argument) for argument in arguments)}]"
    return "none" if hint is NoneType else getattr(hint, "__name__", str(hint))


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
    return {name: text for docs in (*inherited, own) for name, text in docs.items()}
