"""What transformers would show as bars of its own, as stages of ours, while a model is read or written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from importlib import import_module
from typing import Any

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


def _replace_bars() -> Callable[[], object]:
    """Puts stages in the place of transformers' bars, or nothing before it had a hook (5.1); gives the way back."""
    if hasattr(logging, "set_tqdm_hook"):
        before = logging.set_tqdm_hook(lambda _factory, args, kwargs: _Bar(*args, **kwargs))
        return lambda: logging.set_tqdm_hook(before)
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    return logging.enable_progress_bar if drawn else lambda: None


def _gguf_reader() -> dict[str, Any]:
    """The names in transformers' reader of GGUF files, which draws a bar past its hook; none where it has moved."""
    try:
        return vars(import_module("transformers.modeling_gguf_pytorch_utils"))
    except ImportError:
        return {}


@contextmanager
def bars_as_stages():
    """While open, neither transformers nor the hub's client draws bars; what transformers goes through are stages."""
    with _one:
        quiet, gguf = are_progress_bars_disabled(), _gguf_reader()
        bar_of_gguf = gguf.get("tqdm")
        restore = _replace_bars()
        try:
            disable_progress_bars()
            if bar_of_gguf is not None:
                gguf["tqdm"] = _Bar
            yield
        finally:
            restore()
            if bar_of_gguf is not None:
                gguf["tqdm"] = bar_of_gguf
            if not quiet:
                enable_progress_bars()
