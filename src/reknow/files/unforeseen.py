"""What the library did not raise on purpose: a sentence for people, and the traceback in a file."""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path


def unforeseen(error: BaseException) -> str:
    """The sentence for what the library did not raise on purpose."""
    if isinstance(error, OSError) and error.strerror:
        place = f" at {error.filename}" if error.filename is not None else ""
        return (
            f"expected to read and write what the command needs; got {error.strerror}{place}: make room or give "
            f"access, or name another place"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            "expected enough memory; got none for the next step: take a smaller --dtype, fewer edits at a time or a "
            "smaller model"
        )
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"expected no failure here; got {what[:500]}: {_save_traceback(error)}"


def _save_traceback(error: BaseException) -> str:
    """What to do with the traceback, which is kept in a file if that can be written."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="reknow-", suffix=".txt", delete=False
        ) as file:
            file.write(f"{sys.argv}\n\n{text}")
    except OSError:
        return "give --debug to see where, and report it"
    return f"where is in {Path(file.name)}, report it; --debug shows it too"
