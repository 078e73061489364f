"""The formats of exports by name, and what each needs before a model is opened."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from reknow.errors import InputError, MissingExtra, did_you_mean

FORMATS = ("hf", "lora", "gguf-lora", "gguf")


def check_format(form: str, base: Path | None) -> None:
    """Refuses what cannot be written before a model is opened.

    Args:
        base: a GGUF file of the base model.

    Raises:
        InputError: there is no such format, or `base` is missing or no file.
        MissingExtra: the format needs the package gguf.
    """
    if form not in FORMATS:
        raise did_you_mean("export format", form, FORMATS)
    if base is not None and not base.is_file():
        raise InputError(f"expected --base as a GGUF file; {base} is none: give the file")
    if form == "gguf" and base is None:
        raise InputError("expected --base FILE.gguf for --to gguf; got none: name the base model's GGUF file")
    if form.startswith("gguf") and find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf", f"--to {form}")
