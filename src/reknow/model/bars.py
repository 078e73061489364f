"""What transformers would show as bars of its own, as stages of ours, while a model is read or written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import transformers.modeling_gguf_pytorch_utils as gguf
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from reknow.progress import progress

_one = threading.RLock()
"""What is put in the place of bars is so for all threads."""


class _Bar:
    """In the place of a bar around items; one that is moved by hand shows nothing."""

    def __init__(self, items: Iterable[Any] = (), *, desc: str | None = None, **_options: Any):
        self._items, self._what = items, (desc or "")[:1].lower() + (desc or "")[1:].rstrip(" .:")

    def __iter__(self):
        return progress.each(self._what, [*self._items])

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: None

    def __enter__(self):
        return self

    def __exit__(self, *_error) -> None:
        pass


@contextmanager
def bars_as_stages():
    """While open, neither transformers nor the hub's client draws bars; what transformers goes through are stages."""
    with _one:
        quiet, bar_of_gguf = are_progress_bars_disabled(), getattr(gguf, "tqdm", None)
        before = logging.set_tqdm_hook(lambda _factory, args, kwargs: _Bar(*args, **kwargs))
        try:
            disable_progress_bars()
            if bar_of_gguf is not None:
                gguf.tqdm = _Bar
            yield
        finally:
            logging.set_tqdm_hook(before)
            if bar_of_gguf is not None:
                gguf.tqdm = bar_of_gguf
            if not quiet:
                enable_progress_bars()
