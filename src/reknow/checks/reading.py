"""Values as people write them, read by the type that is wanted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from reknow.checks.bounds import convert
from reknow.errors import InputError


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
