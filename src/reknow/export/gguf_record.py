"""What a GGUF file that reknow wrote says of itself, in two of its fields."""

from __future__ import annotations

from pathlib import Path

from reknow.errors import InputError
from reknow.export.about import ExportRecord, refusal
from reknow.export.gguf_files import GGUFFile
from reknow.files.schema import FormatError, parse_json

RECORD_FIELD, CARD_FIELD = "reknow.json", "reknow.card"
"""For programs and for people: the record and the card that other exports have as files."""


def read_gguf_record(path: Path) -> ExportRecord:
    """The record in a GGUF file.

    Raises:
        InputError: there is none, it is broken, or of a later version.
        ModelError: it is no whole GGUF file.
    """
    text = GGUFFile(path).text(RECORD_FIELD)
    if text is None:
        raise InputError(
            f"expected a GGUF file that reknow wrote; {path} says nothing of edits: give one that it exported"
        )
    try:
        return parse_json(ExportRecord, text)
    except FormatError as error:
        raise refusal(path, error) from error
