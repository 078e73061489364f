"""One thread at a time on a model, and nothing left behind of what was to last a while.

A model is one thing: its weights, its hooks and the functions put in place of others are the same for all threads.
So whoever reads or changes it has it alone, from the first pass of an operation to the last. Other threads wait.

What an operation changes for a while is put down before it is changed. An interrupt may come between any two steps of
Python, also where a block is being closed; what it leaves open is undone when the operation ends.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from reknow.checks.arguments import typed
from reknow.errors import InputError

_P = ParamSpec("_P")
_T = TypeVar("_T")

_Undo = Callable[[], object]

_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_making = threading.Lock()


class _Thread(threading.local):
    """What a thread has changed for a while."""

    def __init__(self):
        self.open: list[_Undo] = []


_thread = _Thread()


def _lock(model: nn.Module) -> Any:
    """The lock of a model, also where several `LM` wrap it."""
    with _making:
        return _locks.setdefault(model, threading.RLock())


@contextmanager
def undo_on_exit(undo: _Undo):
    """While open, something is changed; `undo` brings back what was, however much of the change was made.

    It may be called twice, if an interrupt comes while it runs.
    """
    opened, entry = _thread.open, lambda: undo()
    opened.append(entry)
    try:
        yield
    finally:
        if entry in opened:  # the operation has not ended before this block
            undo()
            opened.remove(entry)


class _Beginning(NamedTuple):
    """What an operation finds when it begins."""

    open: list[_Undo]
    count: int
    gradients: bool
    """Whether torch keeps what gradients need: `no_grad` is such a block too."""

    @classmethod
    def now(cls) -> _Beginning:
        return cls(_thread.open, len(_thread.open), torch.is_grad_enabled())

    def come_back(self) -> None:
        """Undoes what was opened since and is open still, the last one first."""
        try:
            while len(self.open) > self.count:
                self.open[-1]()
                self.open.pop()
            if torch.is_grad_enabled() != self.gradients:
                torch.set_grad_enabled(self.gradients)
        except KeyboardInterrupt:  # a second one, while what the first left open is undone
            self.come_back()
            raise


@contextmanager
def exclusive(model: nn.Module):
    """While open, other threads that use the model wait."""
    with _lock(model):
        beginning = _Beginning.now()
        try:
            yield
        finally:
            beginning.come_back()


def _check(lm: Any) -> None:
    """Raises InputError where a model is wanted and something else came."""
    if not isinstance(getattr(lm, "model", None), nn.Module):
        raise InputError(f"expected lm as LM; got {repr(lm)[:60]}: open the model, as in LM('demo:gpt2')")


def exclusively(operation: Callable[_P, _T]) -> Callable[_P, _T]:
    """The operation with the model of its argument `lm`, or of its first one, for itself."""
    names = list(inspect.signature(operation).parameters)
    place = names.index("lm") if "lm" in names else 0

    @wraps(operation)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        lm: Any = kwargs["lm"] if "lm" in kwargs else args[place]
        _check(lm)
        with _lock(lm.model):
            beginning = _Beginning.now()
            try:
                return operation(*args, **kwargs)
            finally:
                beginning.come_back()

    return alone


def typed_exclusively(operation: Callable[_P, _T]) -> Callable[_P, _T]:
    """An operation on a model that users call: its arguments are checked too, see `reknow.checks.arguments`."""
    return typed(exclusively(operation))
