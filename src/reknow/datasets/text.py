"""Plain text: the bundled WikiText-2 sample, local files, or a data set of the hub, as streams with a digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from reknow.datasets.sources import read_text
from reknow.edits import check_encodable
from reknow.errors import InputError, MissingExtra
from reknow.files.digests import digest_now

_LONGEST = 4000
"""Characters after which a paragraph of a local file is cut, so that a file of one line can be streamed."""

_PARAGRAPHS = 8
"""Of the bundled sample that are held out."""
_HELD_OUT = 10_000
"""Characters of a file that are: some 2,000 tokens."""


def sample_text(path: str | Path | None = None) -> list[str]:
    """The paragraphs of the bundled WikiText-2 sample (about 90,000 words), or of a file in its form.

    Headings and blank lines are skipped, and the spaces of WikiText's tokenisation are taken back
    ("1 @.@ 5 – 4 @.@ 9 lb )" → "1.5 – 4.9 lb)"), so that a model reads natural text.

    Raises:
        InputError: the file is missing or not UTF-8.
    """
    source = Path(path) if path is not None else files("reknow") / "assets" / "data" / "wikitext_sample.txt"
    lines = (line.strip() for line in read_text(source, source.name).split("\n"))
    return [_detokenize(line) for line in lines if line and not line.startswith("= ")]


def held_out_texts(path: str | Path | None = None) -> tuple[str, ...]:
    """Texts on which models are compared: paragraphs of the bundled sample of the most usual lengths, some
    340 tokens; or the first 10,000 characters of a file, see `text_source`.

    Raises:
        InputError: there is no such file, or nothing in it.
    """
    if path is None:
        texts = sorted(sample_text(), key=len)
        middle = len(texts) // 2
        return tuple(texts[middle : middle + _PARAGRAPHS])
    chosen, room = list[str](), _HELD_OUT
    for text in text_source(path).texts():
        if room <= 0:
            break
        if text.strip():
            chosen.append(text[:room])
            room -= len(text)
    if not any(len(text.split()) > 1 for text in chosen):
        raise InputError(f"expected text of two words at least in {path}; it has none: give another file")
    return tuple(chosen)


def _detokenize(line: str) -> str:
    line = re.sub(r" @([-,.])@ ", r"\1", line)
    line = re.sub(r' " (.*?) " ?', r' "\1" ', f" {line} ").strip()  # quotation marks stand in pairs
    line = re.sub(r" ([,.;:!?%)\]])", r"\1", line)
    line = re.sub(r"([(\[$£]) ", r"\1", line)
    line = re.sub(r" ('(?:t|s|re|ve|ll|d|m))\b", r"\1", line)
    return re.sub(r"(?<=s) '(?= )", "'", line)


@dataclass(frozen=True)
class TextSource:
    """General text that is read as a stream, always in the same order."""

    name: str
    digest: str
    """A hash of all that decides which texts come."""
    texts: Callable[[], Iterator[str]]
    """Starts the stream."""
    moments: Path | None = None
    """A folder of covariances that are taken instead of being read from the texts; see `reknow.editing.moments`."""


def text_source(where: str | Path | Sequence[str] | None = None) -> TextSource:
    """A source of general text.

    Args:
        where: None: the bundled sample. A list: these texts. A file: its paragraphs (`.jsonl`: the field "text" of
            every line). A folder: its `.txt` and `.jsonl` files by name; where it has none but `.npz` files, these
            covariances, with the bundled sample. `hub:owner/name[:configuration[:split]]`: the field "text" of a data
            set of the hub, streamed at the revision that is current.

    Raises:
        InputError: no such file, none in the folder, or not UTF-8; the data set cannot be opened.
        MissingExtra: a hub address without the packages for it.
    """
    if where is None:
        return TextSource("the bundled WikiText sample", *_bundled())
    if not isinstance(where, (str, Path)):
        texts = list(where)
        return TextSource(f"{len(texts)} texts", _digest(texts), lambda: iter(texts))
    if str(where).startswith("hub:"):
        return _hub_source(str(where))
    path = Path(where).expanduser()
    paths = sorted(p for p in path.iterdir() if p.suffix in (".txt", ".jsonl")) if path.is_dir() else [path]
    if not paths and (kept := sorted(path.glob("*.npz"))):
        digests = [[one.name, _file_digest(one)] for one in kept]
        return TextSource(str(where), _digest(digests), _bundled()[1], path)
    if not paths or not all(one.is_file() for one in paths):
        raise InputError(
            f"expected a file or folder of text (.txt, .jsonl) at {where}; there is none: check the path"
        )

    digests = [[one.name, _file_digest(one)] for one in paths]
    return TextSource(str(where), _digest(digests), lambda: (text for one in paths for text in _file_texts(one)))


@lru_cache
def _bundled() -> tuple[str, Callable[[], Iterator[str]]]:
    texts = sample_text()
    return _digest(texts), lambda: iter(texts)


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    try:
        return digest_now(file)
    except OSError as error:
        raise InputError(f"expected a text file at {file}; got '{error.strerror}': make it readable") from error


def _file_texts(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            if file.suffix == ".jsonl":
                yield from (_field(json.loads(line), f"{file}, line {i}") for i, line in enumerate(lines, 1))
            else:
                yield from _paragraphs(lines)
    except RecursionError:
        raise InputError(f"expected records of text in {file}; got brackets nested without end: correct it") from None
    except ValueError as error:  # bytes that are no UTF-8 among them
        raise InputError(f"expected UTF-8 text in {file}; got '{error}': convert or correct it") from error


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    """Lines up to a blank one as one text; a longer one is cut at the end of a line, or within a long line."""
    text = ""
    for line in lines:
        text = f"{text} {line.strip()}".strip()
        if not line.strip() or len(text) > _LONGEST:
            yield from (text[i : i + _LONGEST] for i in range(0, len(text), _LONGEST))
            text = ""
    if text:
        yield text


def _field(record, where: str) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f"expected a record with a field 'text' in {where}; got {str(record)[:60]!r}: add it")
    check_encodable(where, text)
    return text


def _hub_source(address: str) -> TextSource:
    try:
        import datasets  # type: ignore[import-not-found]
        import huggingface_hub as hub
    except ImportError as error:
        raise MissingExtra(error.name or "datasets", "hub", "streaming a data set from the hub") from None
    name, configuration, split, *_ = [*address.removeprefix("hub:").split(":"), "", ""]
    try:
        revision = hub.dataset_info(name).sha
        split = split or "train"
        stream = datasets.load_dataset(name, configuration or None, split=split, revision=revision, streaming=True)
    except Exception as error:  # the classes of network and name errors differ from version to version
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"expected a data set at {address}; got '{reason}': check name, configuration, split "
            "and network, or give a local file"
        ) from error
    return TextSource(
        address,
        _digest([name, configuration, split, revision]),
        lambda: (_field(record, address) for record in stream),
    )
