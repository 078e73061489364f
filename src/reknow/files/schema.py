"""What a file may hold: JSON is checked against a model of its kind when it is read, and a refusal says the place.

A file kind's model stands beside the code that reads it. Nesting is bounded by the parser (200 levels), texts are
such as can be encoded, numbers are finite, and what the model does not name is refused.
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints, overload

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from typing_extensions import Self

from reknow.errors import ReknowError

_MOST_BYTES = 2**26
"""The largest size of a file that is read as a whole and holds no tensors."""
_SHOWN = 60
"""Characters of a wrong value that a message shows."""


class FormatError(ValueError):
    """What is wrong with a file's content, and where in it; who opened the file adds its name and a remedy."""


class NewerFormat(FormatError):
    """The file is of the format of that number, which only a later version of the library knows."""


class Strict(BaseModel):
    """JSON of a known form: no other fields, no other types, no NaN."""

    # Others are taken first and refused at the end, since pydantic would make an error of each.
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)
    open: ClassVar[bool] = False
    """Whether there may be other fields, as there are where people or later versions add some."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.model_extra and not self.open:
            raise ValueError(f"there is no field {_shorten(min(self.model_extra))} here")
        return self


def _check_finite(value: Any) -> Any:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"expected numbers that are finite; got {one}")
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return value


Count = Annotated[int, Field(ge=0, lt=2**31)]
"""A number of things, or the place of one."""
Object = Annotated[dict[str, JsonValue], AfterValidator(_check_finite)]
"""Any JSON object without NaN and infinity."""

_Read = TypeVar("_Read")
Listed = Annotated[list[_Read], FailFast()]
"""A list of which only the first wrong entry is reported: reporting all takes a hundred times the memory."""


@overload
def parse_json(model: type[_Read], text: str | bytes, *, once: bool = ...) -> _Read: ...
@overload
def parse_json(model: Any, text: str | bytes, *, once: bool = ...) -> Any: ...
def parse_json(model: Any, text: str | bytes, *, once: bool = False) -> Any:
    """The JSON text as a `model`: a `Strict` class, a dataclass, or any other type that pydantic knows.

    Args:
        once: no object may name a field twice, of which JSON parsers take the last.

    Raises:
        FormatError: it is no JSON, or of another form; `NewerFormat`, where its field `format` is too high.
        InputError: a dataclass of the model refuses its values.
    """
    try:
        parsed = _adapter(model).validate_json(text, strict=True)
        if once:
            json.loads(text, object_pairs_hook=_refuse_repeated)
        return parsed
    except ValidationError as error:
        if any(e["loc"] == ("format",) and e["type"] == "less_than_equal" for e in _errors(error)):
            raise NewerFormat(str(next(e["input"] for e in error.errors() if e["loc"] == ("format",)))) from None
        raise FormatError(first_problem(error)) from None


@lru_cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def check_fields(owner: type, values: Mapping[str, Any], where: str) -> None:
    """Raises FormatError where a value is not of its field's type in the class `owner`; others are passed over."""
    hints = get_type_hints(owner)
    for name in values.keys() & hints:
        try:
            parse_json(hints[name], json.dumps(values[name]))
        except FormatError as error:
            raise FormatError(f"{where}.{name}: {error}") from None


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise FormatError(f"the field {twice[:_SHOWN]!r} is there twice")
    return fields


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong, with its place, on one line."""
    first, *others = _errors(error)
    said = first["msg"].removeprefix("Value error, ")
    place = ".".join(map(str, first["loc"]))
    if not place:
        return said
    if any(one["type"] == "missing" for one in (first, *others)):  # whose input is all that there is
        return f"field {place}: {said}"
    return f"field {place}: {said}, got {_shorten(error.errors(include_url=False)[0]['input'])}"


def _errors(error: ValidationError) -> list[Any]:
    return error.errors(include_url=False, include_context=False, include_input=False)


def _shorten(value: Any) -> str:
    text = " ".join(repr(value)[: _SHOWN + 1].split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def check_regular(path: str | Path) -> Path:
    """The path of a regular file; a pipe or a device would be read without end.

    Raises:
        FileNotFoundError: there is nothing.
        FormatError: it is something else.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise FormatError("it is no regular file")
    return path


def read_content(path: str | Path) -> bytes:
    """All of a regular file that holds no tensors.

    Raises:
        OSError: it cannot be read.
        FormatError: it is no regular file, or larger than what such a file can be.
    """
    if (size := check_regular(path).stat().st_size) > _MOST_BYTES:
        raise FormatError(f"it has {size} bytes, more than {_MOST_BYTES}")
    return Path(path).read_bytes()


def explain(error: Exception) -> str:
    """Why a file could not be read, as a clause of a message."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError):
        return f"it cannot be read ({error.strerror or error})"
    return str(error)


@overload
def read_json(
    path: str | Path, model: type[_Read], refuse: Callable[[Exception], ReknowError], *, once: bool = ...
) -> _Read: ...
@overload
def read_json(
    path: str | Path, model: Any, refuse: Callable[[Exception], ReknowError], *, once: bool = ...
) -> Any: ...
def read_json(path: str | Path, model: Any, refuse: Callable[[Exception], ReknowError], *, once: bool = True) -> Any:
    """A JSON file as a `model`; `refuse` makes the error of what is wrong with it, see `explain`.

    Raises:
        ReknowError: what `refuse` made.
    """
    try:
        return parse_json(model, read_content(path), once=once)
    except (OSError, FormatError, ReknowError) as error:
        raise refuse(error) from error
