"""Loads gradio without what it does for editors of code: each of its classes is written again as a stub."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_stubs() -> Iterator[None]:
    """While open, gradio is imported in two thirds of the time, and writes nothing beside its files: it takes classes
    whose file is not known to have no stub."""
    known = inspect.getfile

    def of_others(thing: Any) -> str:
        if isinstance(thing, type) and thing.__module__.startswith("gradio."):
            raise OSError(f"the file of {thing.__module__} is not asked for while it is imported")
        return known(thing)

    inspect.getfile = of_others
    try:
        yield
    finally:
        inspect.getfile = known
