"""The published methods, one file each; `reknow.registry` is their table."""

from __future__ import annotations

from reknow.checks.arguments import typed
from reknow.contract import Method
from reknow.registry import METHODS, make

__all__ = ["METHODS", "method"]


@typed
def method(name: str, **settings) -> Method:
    """The method of that name: `method("ft-m", steps=40)`.

    Raises:
        InputError: no such method, or no such field; names the near ones.
    """
    return make(name, settings)
