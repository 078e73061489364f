"""Standard output and error of the program, to which writing never fails: a command does its work all the same."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import contextmanager
from typing import TextIO


class _Raw(io.RawIOBase):
    """The file behind a stream. What cannot be written is dropped, and `lost` is the reason."""

    def __init__(self, number: int):
        self._file = io.FileIO(number, "w", closefd=False)
        self.lost: OSError | None = None

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, data) -> int | None:
        if self.lost is None:
            try:
                return self._file.write(data)
            except OSError as error:
                self.lost = error
        return len(data)


def _stream(raw: _Raw, before: TextIO | None) -> TextIO:
    """A text stream on the file in the encoding of the one before; signs that it lacks are written as `\\u2192`."""
    encoding = "utf-8" if before is None else before.encoding
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=raw.fileno() == 2 or raw.isatty())


@contextmanager
def forgiving_streams():
    """While open, `sys.stdout` and `sys.stderr` take every text, and writing to them never fails.

    Gives a function that says why standard output was cut short: None where it was not, or where its reader has left.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, so that no file of ours becomes a stream
    before = sys.stdout, sys.stderr
    out, err = _Raw(1), _Raw(2)
    sys.stdout, sys.stderr = _stream(out, before[0]), _stream(err, before[1])

    def cut_short() -> str | None:
        sys.stdout.flush()
        return None if out.lost is None or out.lost.errno == errno.EPIPE else out.lost.strerror

    try:
        yield cut_short
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
