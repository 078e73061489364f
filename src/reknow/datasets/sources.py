"""Where data files come from: a text on disk in whatever encoding, or a file of the Hugging Face Hub."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

from reknow.errors import InputError, MissingExtra

_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "ZIP, as Excel's workbooks are", b"PAR1": "Parquet"}
"""First bytes of what is no text, and what it is."""
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_text(source: Any, name: str, encoding: str | None = None) -> str:
    """The text of a file without its byte order mark.

    Args:
        encoding: as Python names it; None: what the byte order mark says, else UTF-8.

    Raises:
        InputError: no such file or encoding; bytes that are no text in it (the first is named); a packed file.
    """
    try:
        content = source.read_bytes()
    except (OSError, ValueError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else f"'{getattr(error, 'strerror', error)}'"
        raise InputError(f"expected a readable file at {name}; got {what}: check the path") from None
    for start, kind in _PACKED.items():
        if content.startswith(start):
            raise InputError(
                f"expected a text file at {name}; got a packed one ({kind}): unpack it, or save it as CSV or JSON"
            )
    wanted = _encoding_of(content, encoding)
    try:
        return re.sub("\r\n?", "\n", content.decode(wanted))
    except UnicodeDecodeError as error:
        at, line = error.start, content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"expected {wanted.upper()} in {name}; got byte 0x{content[at]:02x} at {at}, line {line}: name its "
            "encoding, as in --encoding cp1252 (in Python: encoding=), or save it as UTF-8"
        ) from None
    except (LookupError, ValueError):
        raise InputError(
            f"expected an encoding such as utf-8, cp1252 or gb18030; got {encoding!r}: correct it"
        ) from None


def _encoding_of(content: bytes, given: str | None) -> str:
    """What the byte order mark says, else the given one, else UTF-8."""
    return next((own for mark, own in _MARKS.items() if content.startswith(mark)), given or "utf-8")


def undecodable_lines(file: Path, encoding: str | None = None) -> dict[int, str]:
    """Number of a line → what in it is no text in this encoding; empty where all is, where the file is packed or
    no text at all, as a picture or weights are, which have bytes of zero; or where line ends are no single bytes.

    Args:
        encoding: see `read_text`.
    """
    content, wrong = file.read_bytes(), dict[int, str]()
    wanted = _encoding_of(content, encoding)
    if "16" in wanted or "32" in wanted or b"\0" in content or any(map(content.startswith, _PACKED)):
        return wrong
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            line.decode(wanted)
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x} at {error.start} of the line"
            wrong[number] = (
                f"expected {wanted.upper()}; got {byte}: name the encoding of the file, as in --encoding cp1252, or "
                "save it as UTF-8"
            )
    return wrong


def download(address: str) -> Path:
    """Download `hub:owner/name[:file]` from the data sets of the Hugging Face Hub; return its local path.

    Raises:
        InputError: wrong address, no such data set or file, no network, or several files and none named.
        MissingExtra: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub as hub
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", "reading a data set from the hub") from None
    repository, _, file = address.removeprefix("hub:").partition(":")
    try:
        file = file or _choose_file(address, hub.list_repo_files(repository, repo_type="dataset"))
        return Path(hub.hf_hub_download(repository, file, repo_type="dataset"))
    except InputError:
        raise
    except Exception as error:  # the classes of network and name errors differ from version to version
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"expected a data set on the hub at {address!r}; got '{reason}': check the name and the network, "
            "or download the file and give its path"
        ) from error


def _choose_file(address: str, files: list[str]) -> str:
    usable = [file for file in files if file.endswith((".json", ".jsonl"))]
    if len(usable) != 1:
        raise InputError(
            f"expected one JSON file in {address!r}; got {', '.join(usable) or 'none'}: name it, as in "
            "hub:owner/name:file.json"
        )
    return usable[0]
