"""What users call checks its arguments against its signature, before it does anything."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from types import SimpleNamespace, UnionType
from typing import Any, NamedTuple, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, InstanceOf, TypeAdapter

from reknow.checks.bounds import SHOWN, convert_with, describe_type, members_of
from reknow.errors import InputError

_P = ParamSpec("_P")
_T = TypeVar("_T")

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_WHOLE = (str, bytes, list, tuple, Mapping)
"""What is checked as it is, though it gives items one by one."""
_CONFIG = ConfigDict(strict=True, arbitrary_types_allowed=True)


class _Argument(NamedTuple):
    """An argument's type, in which every sequence is a tuple, and what checks it."""

    hint: Any
    adapter: TypeAdapter[Any]

    def check(self, name: str, value: Any) -> None:
        """Raises InputError where the value is nothing of the type. What gives its items one by one is left alone."""
        parts = members_of(self.hint)
        listed = any(get_origin(part) is tuple for part in parts)
        if listed and isinstance(value, str) and str not in parts:
            raise InputError(
                f"expected {name} as {describe_type(self.hint)}; got one text {value[:SHOWN]!r}: put it in brackets"
            )
        if not listed or isinstance(value, _WHOLE) or not isinstance(value, Iterable):
            convert_with(name, value, self.hint, self.adapter)


def typed(operation: Callable[_P, _T]) -> Callable[_P, _T]:
    """The operation, which refuses arguments that it does not have, or that are nothing of their type, with an
    InputError; others go in as they are.

    An argument without a type is left to the operation, as is `lm`.
    """
    signature = inspect.signature(operation)

    @cache
    def known() -> dict[str, _Argument]:  # when it is called first: a type may be defined further down
        return _argument_checks(signature, inspect.unwrap(operation).__globals__)

    @wraps(operation)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            names = ", ".join(name for name in signature.parameters if name != "self")
            raise InputError(f"expected {operation.__name__}({names}); {error}: correct the call") from None
        for name, argument in known().items():
            if name in given:
                argument.check(name, given[name])
        return operation(*args, **kwargs)

    return called


def _argument_checks(signature: inspect.Signature, names: dict[str, Any]) -> dict[str, _Argument]:
    known: dict[str, _Argument] = {}
    for name, parameter in signature.parameters.items():
        if name != "lm" and parameter.kind not in _VARIABLE and parameter.annotation is not parameter.empty:
            one = SimpleNamespace(__annotations__={name: parameter.annotation})
            hint = _to_checkable(get_type_hints(one, names, include_extras=True)[name])
            own = InstanceOf() in get_args(hint)  # type: ignore[operator]
            config = None if own else _CONFIG  # a dataclass has one of its own
            known[name] = _Argument(hint, TypeAdapter[Any](hint, config=config))
    return known


def _to_checkable(hint: Any) -> Any:
    """The type with tuples for sequences of every kind, and classes of ours for no more than what they are."""
    origin = get_origin(hint)
    if origin in (Sequence, Iterable, list):
        return tuple[_to_checkable(get_args(hint)[0]), ...]
    if origin in (Union, UnionType):
        return Union[tuple(map(_to_checkable, get_args(hint)))]  # noqa: UP007, of as many as there are
    return InstanceOf[hint] if isinstance(hint, type) and hint.__module__.startswith("reknow") else hint
