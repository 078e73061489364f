"""What the settings of a method, a training or a run may be: types with bounds, checked when the settings are made.

The bounds stand on the fields, as `rank: Rank = 8`, and whoever shows or reads a setting takes them from there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from reknow.errors import InputError

_MOST = 10**9
SHOWN = 60
"""Characters of a wrong value that a message shows."""

Number = Annotated[int, Field(ge=1, le=_MOST)]
"""How many, of what there must be one at least."""
Natural = Annotated[int, Field(ge=0, le=_MOST)]
"""How many, of what there may be none."""
Rank = Annotated[int, Field(ge=1, le=2**16)]
"""The rank of a matrix, or another of its sizes; no model that fits into memory has a wider one."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(gt=0)]
"""How fast, or how large: nothing happens at 0."""
NonNegative = Annotated[float, Field(ge=0)]
"""A bound, a weight in a sum or a length; 0 mostly switches it off."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A part of something, or a probability."""
Part = Annotated[float, Field(gt=0, le=1)]
"""Such a part that is not nothing."""
Name = Annotated[str, Field(min_length=1)]
"""The name of a file, a folder or a model."""

_SIGNS = {"ge": "≥", "gt": ">"}
"""Signs of the bounds that a type shows; the upper bounds only keep off what is absurd."""
_WORDS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}


@dataclass(frozen=True)
class Formerly:
    """Stands on a field, as in `Annotated[Number, Formerly("turns")]`: a name that the setting had before.

    For one release it is read, with a warning.
    """

    name: str
    values: Mapping[Any, Any] = field(default_factory=dict)
    """What values of then are called now."""
    also: Mapping[str, Any] = field(default_factory=dict)
    """Other settings that the old name stood for, unless it was None."""


Units = Annotated[Literal["relative", "absolute"], Formerly("absolute", {True: "absolute", False: "relative"})]
"""What learning rates, bounds and radii are given in: relative to the model's own numbers, or as plain numbers, as in
the papers."""


def former_names(owner: type) -> dict[str, tuple[str, Formerly]]:
    """Former name → the field that it is now, and what is known of it."""
    known = get_type_hints(owner, include_extras=True)
    return {mark.name: (name, mark) for name, hint in known.items() for mark in _marks(hint)}


def current_names(owner: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under the names that their fields have now; warns where one is given under a former name.

    Settings that the class has no more, its `removed`, are left out.

    Raises:
        InputError: one is given under both names.
    """
    former, removed = former_names(owner), getattr(owner, "removed", ())
    current = {name: value for name, value in settings.items() if name not in former and name not in removed}
    for old in [name for name in settings if name in former]:
        name, mark = former[old]
        value = settings[old]
        if value is None and (name in current or mark.also):
            continue  # it was not used
        if name in settings and not mark.also:
            raise InputError(f"expected {name} once; got it as {old} too, which it was called before: keep one")
        warnings.warn(
            f"the setting {old} of {owner.__name__} is called {name} now; the old name is read for one more release",
            FutureWarning,
            stacklevel=2,
        )
        current |= {name: mark.values.get(value, value) if mark.values else value, **mark.also}
    return current


def refuse_mixed(owner: type, settings: Mapping[str, Any]) -> None:
    """Raises InputError where a former name stands for a setting in other units and another setting, by what is given
    or by default, has a value in the units of before: the two cannot be said together any more."""
    known = get_type_hints(owner, include_extras=True)
    marks = {name: mark for name, hint in known.items() for mark in _marks(hint) if mark.also}
    given = {name: mark for name, mark in marks.items() if settings.get(mark.name) is not None}
    for name in marks.keys() - given.keys() if given else ():
        if (value := settings.get(name, getattr(owner, name))) is not None:
            used, mark = next(iter(given.items()))
            units = ", ".join(f"{key}={other}" for key, other in mark.also.items())
            raise InputError(
                f"expected {name} in the units of {mark.name}; got {value}, which is in others: give {used} and "
                f"{name} as numbers, with {units}"
            )


def _marks(hint: Any) -> list[Formerly]:
    return [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Formerly)]


def _strip_marks(hint: Any) -> Any:
    """The type without marks of former names."""
    if not _marks(hint):
        return hint
    rest = tuple(mark for mark in hint.__metadata__ if not isinstance(mark, Formerly))
    return Annotated[(hint.__origin__, *rest)] if rest else hint.__origin__


def check_settings(settings: Any) -> None:
    """Checks every field of a dataclass against its type; a list becomes a tuple, a whole number a float where one is
    wanted.

    Raises:
        InputError: a value that its field cannot have.
    """
    for name, (hint, adapter) in _fields(type(settings)).items():
        value = convert_with(name, getattr(settings, name), hint, adapter)
        object.__setattr__(settings, name, value)


def field_types(owner: type) -> Mapping[str, Any]:
    """Field → type, with its bounds, of a dataclass."""
    return {name: hint for name, (hint, _) in _fields(owner).items()}


def layer_field(owner: type) -> str | None:
    """The field of a method that says which layers it edits; None: it has none."""
    return next((name for name in ("layers", "layer") if name in _fields(owner)), None)


def convert(name: str, value: Any, hint: Any, got: str | None = None) -> Any:
    """The value as one of the type `hint`, of the setting `name`.

    Args:
        got: how a message shows it; None: as Python does.

    Raises:
        InputError: it is none.
    """
    return convert_with(name, value, hint, _adapter(hint), got)


@lru_cache
def _fields(owner: type) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    known = get_type_hints(owner, include_extras=True)
    hints = {field.name: _strip_marks(known[field.name]) for field in fields(owner)}
    return {name: (hint, _adapter(hint)) for name, hint in hints.items()}


def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True))


def convert_with(name: str, value: Any, hint: Any, adapter: TypeAdapter[Any], got: str | None = None) -> Any:
    """As `convert`, with the adapter of the type made before."""
    try:
        return adapter.validate_python(_to_python(value))
    except ValidationError as error:
        shown = repr(value) if got is None else got
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
        listed = any(get_origin(part) is tuple for part in members_of(hint))
        bracket = listed and value is not None and not isinstance(value, (tuple, list))
        remedy = "put it in brackets" if got is None and bracket else "correct it"
        raise InputError(f"expected {name} {_describe_wanted(hint, error)}; got {shown}: {remedy}") from None


def _to_python(value: Any) -> Any:
    """The value without what only Python knows: numpy's numbers, lists, paths."""
    if type(value) in (list, tuple):
        return tuple(map(_to_python, value))
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _describe_wanted(hint: Any, error: ValidationError) -> str:
    """What the value ought to be: the bound that it is beyond, or the type."""
    for part in members_of(hint):
        if (range_ := _range(part)) is not None and error.errors()[0]["type"] != "float_type":
            return range_
    for one in error.errors(include_url=False):
        for sign, limit in one.get("ctx", {}).items():
            if sign in _WORDS and not any(isinstance(step, int) for step in one["loc"]):
                return f"{_WORDS[sign]} {int(limit):,}"
    return f"as {describe_type(hint)}"


def describe_type(hint: Any) -> str:
    """A type in words: `int ≥ 1 or none`, `float from 0 to 1`, `one of a, b`, `[[int, int], …]`."""
    parts = members_of(hint)
    if len(parts) > 1:
        return " or ".join(map(describe_type, parts))
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        shown, bounds = describe_type(arguments[0]), _bounds(hint)
        if (range_ := _range(hint)) is not None:
            return f"{shown} {range_}"
        if "min_length" in bounds:
            return f"non-empty {shown}"
        return " ".join([shown, *(f"{_SIGNS[sign]} {bounds[sign]}" for sign in _SIGNS if sign in bounds)])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"[{', '.join('…' if argument is ... else describe_type(argument) for argument in arguments)}]"
    return "none" if hint is NoneType else getattr(hint, "__name__", str(hint))


def members_of(hint: Any) -> tuple[Any, ...]:
    """The types of which the value has one."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _bounds(hint: Any) -> dict[str, Any]:
    """Sign → limit of a number with bounds."""
    infos = [part for part in get_args(hint)[1:] if isinstance(part, FieldInfo)]
    return {sign: limit for info in infos for bound in info.metadata for sign, limit in asdict(bound).items()}


def _range(hint: Any) -> str | None:
    """The bounds of a float that has two, in words."""
    bounds = _bounds(hint) if get_origin(hint) is Annotated and get_args(hint)[0] is float else {}
    if "le" not in bounds:
        return None
    low = f"from {bounds['ge']}" if "ge" in bounds else f"above {bounds['gt']} up"
    return f"{low} to {bounds['le']}"
