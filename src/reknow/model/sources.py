"""What a model's name stands for: a bundled model, one in a package, a folder, or a repository of the hub; found out
before any work.

What is nowhere is refused within seconds, with the nearest names that are there.
"""

from __future__ import annotations

import difflib
import os
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from reknow.errors import InputError, MissingExtra, ModelError, did_you_mean
from reknow.files.outputs import STACK_FILE
from reknow.model.packaged import DEMO, PACKAGED, check_installed, converted, kept_folder

CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_FILES = (CONFIG, _ADAPTER, "tokenizer_config.json", "tokenizer.json")
"""One of these lies in every folder of a model, an adapter or a tokenizer."""
PATIENCE = "HF_HUB_ETAG_TIMEOUT"
"""The setting of the hub's library that says how many seconds its answer may take."""
_SECONDS = 2.0
"""Where that is not set."""


@dataclass(frozen=True)
class Source:
    """A model or a tokenizer that is there."""

    name: str
    """A folder, a GGUF file, or a repository of the hub."""
    offline: bool = False
    """Whether the hub does not answer, and only its cache may be read."""
    packaged: str | None = None
    """The demo model that a package holds, which may have to be converted first: see `readable`."""
    gguf: bool = False
    """Whether it is a GGUF file."""


@contextmanager
def readable(source: Source) -> Iterator[Source]:
    """Gives the source as something that transformers reads. What is in a package is converted, if it is not yet.

    Raises:
        ModelError, InputError: it cannot be.
    """
    if source.packaged is None:
        yield source
        return
    with converted(source.packaged) as folder:
        yield replace(source, name=str(folder))


def find_source(name: str) -> Source:
    """Where the model or tokenizer of this name lies.

    Raises:
        InputError: a demo model that does not exist, a file that is no GGUF file, or no name at all.
        ModelError: there is no such folder, it holds no model of transformers, the hub has none of that name, or the
            package of a demo model is not installed.
        MissingExtra: it is a GGUF file, and the package that reads them is not installed.
    """
    if name.startswith(DEMO):
        return _find_demo(name.removeprefix(DEMO))
    path = os.path.expanduser(name)
    if os.path.isdir(path) and name.strip():
        _check_folder(Path(path))
        return Source(path)
    if os.path.isfile(path):
        if not is_gguf(Path(path)):
            raise InputError(f"expected the folder of a model; {name} is a file: give the folder that it lies in")
        if (kind := gguf_type(Path(path))) != "model":
            raise ModelError(f"expected a GGUF file of a whole model; {name} holds another thing ({kind}): {_WHOSE}")
        if find_spec("gguf") is None:
            raise MissingExtra("gguf", "gguf", f"the GGUF file {name}")
        return Source(path, offline=True, gguf=True)
    if os.path.isabs(path) or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"expected a folder with a model; {name} could not be loaded (there is no such folder"
            f"{_near_names(name)}): check the path"
        )
    return _in_hub(name)


def _find_demo(name: str) -> Source:
    if name in PACKAGED:
        check_installed(name)
        return Source(str(kept_folder(name)), packaged=name)
    if name not in (known := _demo_names()):
        raise did_you_mean("demo model", name, known)
    return Source(str(files("reknow") / "assets" / "models" / name))


def _demo_names() -> list[str]:
    folder = files("reknow") / "assets" / "models"
    bundled = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return [*bundled, *PACKAGED]


def _check_folder(folder: Path) -> None:
    """Raises ModelError where the folder holds no configuration, which all models of transformers have."""
    if any((folder / name).is_file() for name in _FILES):
        return
    if (folder / STACK_FILE).is_file():
        raise ModelError(
            f"expected a folder that transformers saved; {folder} is a stack of patches, which is no base model: "
            f"`reknow apply PATCH --stack NEW --model {folder}` makes one that begins with what is there"
        )
    packed = sorted(file for file in folder.glob("*.gguf") if file.is_file())
    if packed and not (whole := [file for file in packed if gguf_type(file) == "model"]):
        raise ModelError(
            f"expected a folder that transformers saved; {folder} holds no model, but {packed[0].name}: {_WHOSE}"
        )
    if packed:
        raise ModelError(
            f"expected a folder that transformers saved, or a GGUF file; {folder} holds GGUF files: give one, such "
            f"as {whole[0]}"
        )
    inside = ", ".join(_sibling_models(str(folder / CONFIG))[:3])
    near = f"; models in it: {inside}" if inside else _near_names(str(folder))
    raise ModelError(
        f"expected a folder that transformers saved; {folder} could not be loaded (it has no {CONFIG}{near}): give "
        "the folder that holds one"
    )


_WHOSE = "give the model that it is for, and ask llama.cpp for both"
_BEGINNING, _TYPE_FIELD = 1 << 16, b"general.type" + struct.pack("<I", 8)
"""Bytes of a GGUF file in which what it holds stands, since the fields `general.…` come first; name of the field, and
that its value is a text."""


def gguf_type(file: Path) -> str:
    """What a GGUF file says it holds: model, adapter, mmproj, imatrix …; model where it says nothing."""
    with file.open("rb") as opened:
        _, found, value = opened.read(_BEGINNING).partition(_TYPE_FIELD)
    if not found or len(value) < 8:
        return "model"
    return value[8 : 8 + struct.unpack("<Q", value[:8])[0]].decode(errors="replace")


def is_gguf(file: Path) -> bool:
    """Whether it is a GGUF file, by its first bytes or its name."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF" or file.suffix.lower() == ".gguf"


# --- the hub ---------------------------------------------------------------------------------------------------


def _in_hub(name: str) -> Source:
    """The repository of that name: on the hub, or in its cache where the hub is silent."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"expected a model's folder, its name on the hub, or {DEMO}gpt2; got {name!r}, which is no folder and "
            "cannot be a name: check it"
        ) from error
    problem = _ask_hub(name)
    if problem is None:
        return Source(name)
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in _FILES):
        return Source(name, offline=True)
    raise ModelError(
        f"expected a model's folder, its name on the hub, or {DEMO}gpt2; {name!r} could not be loaded (it is no "
        f"folder here nor in the hub's cache, and {problem}{_near_names(name)}): check the name"
    )


def _ask_hub(name: str) -> str | None:
    """Why the hub does not give the repository; None: it does. Takes no longer than is allowed."""
    seconds = float(os.environ.get(PATIENCE) or _SECONDS)
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name)
            answer.append(None)
        except Exception as error:  # of several libraries, by what is installed
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # what looks up an address knows no bound of time
    thread.start()
    thread.join(seconds)
    if not answer:
        return f"the hub does not answer within {seconds:g} seconds unless {PATIENCE} allows more"
    if (error := answer[0]) is None:
        return None
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has none of that name, or it is private and `hf auth login` is needed"
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is not asked, since HF_HUB_OFFLINE is set"
    return f"the hub does not answer: {' '.join(str(error).split()) or type(error).__name__}"


# --- near names ------------------------------------------------------------------------------------------------


def _near_names(name: str) -> str:
    """The nearest names of models that are on this disk, as a part of a sentence; empty where none is near."""
    known = [*_sibling_models(name), *_cached_models(), *(DEMO + demo for demo in _demo_names())]
    by_last = {re.split(r"[/:]", known_name)[-1].lower(): known_name for known_name in reversed(known)}
    near = difflib.get_close_matches(re.split(r"[/:]", name.rstrip("/"))[-1].lower(), by_last, n=3, cutoff=0.6)
    return f"; near it: {', '.join(by_last[one] for one in near)}" if near else ""


def _sibling_models(name: str) -> list[str]:
    """Folders with models in the folder in which the name would lie."""
    parent = Path(os.path.expanduser(name.rstrip("/"))).parent
    wanted = (CONFIG, _ADAPTER, "stack.json")
    try:
        return [str(one) for one in sorted(parent.iterdir()) if any((one / file).is_file() for file in wanted)]
    except OSError:  # there is no such folder, or it may not be read
        return []


def _cached_models() -> list[str]:
    """Names of the models in the hub's cache."""
    cache = Path(constants.HF_HUB_CACHE)
    return ["/".join(entry.name.split("--")[1:]) for entry in sorted(cache.glob("models--*"))]
