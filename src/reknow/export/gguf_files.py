"""GGUF files read and written anew with some tensors changed and all other bytes as they were, block by block.

A file is a head (magic, version, numbers of tensors and of fields), the fields, a line for each tensor (name, size,
type, place), and the tensors' bytes in the order of these lines, each from a multiple of the alignment on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFValueType, ReaderTensor

from reknow.errors import ModelError
from reknow.progress import progress

NOTE = "reknow."
"""How the names of the fields begin that an export adds."""
_BLOCK = 1 << 24


@dataclass(frozen=True)
class NewTensor:
    """What takes the place of a tensor."""

    kind: GGMLQuantizationType
    make: Callable[[], np.ndarray]
    """Its values as the type stores them, made when they are written."""


class GGUFFile:
    """An open GGUF file, of which nothing but the fields is in memory.

    Raises:
        ModelError: it is no whole GGUF file, or one of several parts.
    """

    def __init__(self, path: Path):
        self.path = path
        with _as_model_error(path):
            self._reader = GGUFReader(path)
            self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in self._reader.tensors}
            last = max((tensor.data_offset + tensor.n_bytes for tensor in self.tensors.values()), default=None)
        if self._reader.endianess != GGUFEndian.LITTLE:
            raise ModelError(f"expected a little-endian GGUF file; {path} is none: convert it again")
        if last is None or last > path.stat().st_size:
            raise ModelError(f"expected a whole GGUF file; {path} ends before its tensors: get it again")
        if (self.number("split.count") or 1) > 1:
            raise ModelError(
                f"expected a GGUF file that holds the whole model; {path} is one of several parts: put them together "
                "with llama.cpp's `llama-gguf-split`"
            )

    @property
    def architecture(self) -> str:
        """The model's architecture by llama.cpp's name; empty where the file does not say."""
        return self.text("general.architecture") or ""

    def text(self, key: str) -> str | None:
        """The text of a field; None where there is none."""
        field = self._reader.fields.get(key)
        if field is None or field.types != [GGUFValueType.STRING]:
            return None
        return bytes(field.parts[field.data[0]]).decode("utf-8", "replace").rstrip()

    def number(self, key: str) -> int | None:
        """The whole number of a field; None where there is none."""
        field = self._reader.fields.get(key)
        is_text = field is None or field.types[0] in (GGUFValueType.STRING, GGUFValueType.ARRAY)
        return None if field is None or is_text else int(field.parts[field.data[0]][0])

    def write_with(self, new: Path, changed: Mapping[str, NewTensor], notes: Mapping[str, str]) -> dict[str, range]:
        """Writes the file anew with these tensors in place of its own, and with fields that hold the notes.

        Returns:
            which bytes of the new file hold the text of each note.
        """
        kept = [(name, span) for name, span in self._fields() if not name.startswith(NOTE)]
        places: dict[str, range] = {}
        total = sum(tensor.n_bytes for tensor in self.tensors.values())
        with (
            self.path.open("rb") as old,
            new.open("wb") as out,
            progress.stage(f"writing {new.name}", total, unit="bytes") as advance,
        ):
            version = int(self._reader.fields["GGUF.version"].parts[0][0])
            out.write(b"GGUF" + struct.pack("<IQQ", version, len(self.tensors), len(kept) + len(notes)))
            for _, span in kept:
                _copy(old, out, span)
            for name, text in notes.items():
                written = text.encode()
                out.write(_text(name) + struct.pack("<IQ", GGUFValueType.STRING, len(written)))
                places[name] = range(out.tell(), out.tell() + len(written))
                out.write(written)
            self._write_lines(out, changed)
            for name, tensor in self.tensors.items():
                self._pad(out)
                if name in changed:
                    out.write(np.ascontiguousarray(changed[name].make()).data)
                else:
                    _copy(old, out, range(tensor.data_offset, tensor.data_offset + tensor.n_bytes))
                advance(tensor.n_bytes)
            self._pad(out)
        return places

    def _fields(self) -> Iterator[tuple[str, range]]:
        """Name and bytes of each field, in order."""
        own = [(name, field.offset) for name, field in self._reader.fields.items() if not name.startswith("GGUF.")]
        ends = [offset for _, offset in own[1:]] + [next(iter(self.tensors.values())).field.offset]
        for (name, start), end in zip(own, ends, strict=True):
            yield name, range(start, end)

    def _write_lines(self, out: BinaryIO, changed: Mapping[str, NewTensor]) -> None:
        place = 0
        for name, tensor in self.tensors.items():
            kind = changed[name].kind if name in changed else tensor.tensor_type
            sizes = [int(size) for size in tensor.shape]
            out.write(_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, place))
            size = stored_bytes(int(tensor.n_elements), kind) if name in changed else int(tensor.n_bytes)
            place += size + -size % self._reader.alignment

    def _pad(self, out: BinaryIO) -> None:
        out.write(b"\0" * (-out.tell() % self._reader.alignment))


def stored_bytes(numbers: int, kind: GGMLQuantizationType) -> int:
    """How many bytes so many numbers take in the type."""
    block, size = GGML_QUANT_SIZES[kind]
    return numbers // block * size


def fill_note(file: Path, place: range, text: str) -> None:
    """Writes another text in the place of a note, of its length at most; blanks fill the rest."""
    written = text.encode().ljust(len(place))
    assert len(written) == len(place), "a note outgrew its place"
    with file.open("rb+") as out:
        out.seek(place.start)
        out.write(written)


def _text(value: str) -> bytes:
    written = value.encode()
    return struct.pack("<Q", len(written)) + written


def _copy(old: BinaryIO, out: BinaryIO, span: range) -> None:
    old.seek(span.start)
    left = len(span)
    while left and (block := old.read(min(_BLOCK, left))):
        out.write(block)
        left -= len(block)


@contextmanager
def _as_model_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:  # the file may be broken in any way
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ModelError(f"expected a whole GGUF file; {path} could not be read ({reason}): get it again") from error
