"""What every export says of itself: `reknow.json`, for programs, with a checksum of every file beside it."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import transformers
from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import Field

import reknow
from reknow.edits import to_json
from reknow.errors import InputError
from reknow.export.measure import Measured
from reknow.files.digests import file_digest
from reknow.files.outputs import MARK, marked_files, output_folder
from reknow.files.schema import NewerFormat, Object, Strict, explain, read_json
from reknow.files.strict_json import strict_json
from reknow.lm import LM
from reknow.model.packaged import packaged_model
from reknow.model.sources import is_gguf
from reknow.patching.record import PatchRecord
from reknow.progress import progress

CARD = "README.md"
"""The file of the model card."""
FORMAT = 1
KINDS = {
    "hf": "a checkpoint of transformers",
    "lora": "a PEFT LoRA adapter",
    "gguf-lora": "a GGUF LoRA adapter for llama.cpp",
    "gguf": "a GGUF model",
}
"""Kind of an export → what it is."""
_LICENCES = {"Apache-2.0": "apache-2.0", "Gemma Terms of Use": "gemma"}
"""Licence of a packaged model → its name on the hub."""


class Base(Strict):
    """The base model of an export."""

    open: ClassVar[bool] = True

    name: str
    """As it was opened."""
    model: str | None
    """Its name on the hub, where it has one."""
    licence: str | None
    """By its name on the hub, where its files say it."""
    structure: str
    tokenizer: str
    dtype: str
    weights: str
    """The fingerprint's digest: the same for the same weights in the same dtype."""


class ExportRecord(Strict):
    """What is in `reknow.json`."""

    open: ClassVar[bool] = True

    written_by: Literal["reknow export"]
    format: Annotated[int, Field(ge=1, le=FORMAT)]
    kind: Annotated[str, Field(min_length=1)]
    written: str
    """When, in local time with its offset."""
    versions: dict[str, str]
    base: Base
    patches: list[Object]
    """Each with its id, method, settings, edits, and the matrices that it changes."""
    measured: Object
    """How the first edits are answered."""
    files: dict[str, str]
    """SHA-256 by name, of all files but this one."""


def check_place(lm: LM, folder: str | Path, overwrite: bool) -> Path:
    """Where an export goes; raises InputError where it would take the place of anything but an export."""
    if Path(folder).exists() and not overwrite:
        raise InputError(f"expected a new folder; {folder} exists: choose another name or overwrite it")
    return output_folder(Path(folder), True, marked_files, (lm.name, lm.model.name_or_path))


def describe_export(lm: LM, kind: str, measured: Measured) -> dict[str, Any]:
    """The record of an export, before there are files beside it."""
    return {
        "written_by": "reknow export",
        "format": FORMAT,
        "kind": kind,
        "written": now(),
        "versions": _versions(),
        "base": _describe_base(lm),
        "patches": [_describe_patch(patch) for patch in lm.patches],
        "measured": _describe_measured(measured),
        "files": {},
    }


def now() -> str:
    """The local time with its offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _versions() -> dict[str, str]:
    found = {"reknow": reknow.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    with suppress(PackageNotFoundError):
        found["gguf"] = version("gguf")
    return {**found, "python": platform.python_version()}


def _describe_base(lm: LM) -> dict[str, Any]:
    fingerprint = lm.fingerprint
    return {
        "name": lm.name,
        "model": hub_name(lm),
        "licence": find_licence(lm),
        "structure": fingerprint.structure,
        "tokenizer": fingerprint.tokenizer,
        "dtype": fingerprint.dtype,
        "weights": fingerprint.digest,
    }


def _describe_patch(patch: PatchRecord) -> dict[str, Any]:
    return {
        "id": patch.id,
        "method": patch.method,
        "settings": patch.settings,
        "edits": [to_json(edit) for edit in patch.edits],
        "matrices": {name: {"rank": delta.rank, "norm": delta.norm()} for name, delta in patch.deltas.items()},
        "made_on": list(patch.made_on),
        "version": patch.version,
    }


def _describe_measured(measured: Measured) -> dict[str, Any]:
    moments = {"before": measured.before, "after": measured.after, "written": measured.written}
    return {
        "how": f"teacher-forced, exact; {measured.how}",
        "edits": measured.total,
        "asked": len(measured.edits),
        "held": measured.held,
        **{name: [asdict(answer) for answer in answers] for name, answers in moments.items() if answers is not None},
    }


def hub_name(lm: LM) -> str | None:
    """The name on the hub of the base, or of the model that a packaged one was made from; None: it has none."""
    packaged = packaged_model(lm.name, lm.model.name_or_path)
    told = (_gguf_field(lm, "general.base_model.0.repo_url") or "").removeprefix("https://huggingface.co/")
    for name in (packaged.original if packaged else "", told, lm.name, lm.model.name_or_path or ""):
        try:
            validate_repo_id(name)
        except HFValidationError:
            continue
        if "/" in name and not Path(name).exists():
            return name
    return None


def find_licence(lm: LM) -> str | None:
    """The licence of the base by its name on the hub, where a package, its GGUF file or the card
    beside its files names it."""
    if packaged := packaged_model(lm.name, lm.model.name_or_path):
        return _LICENCES.get(packaged.licence)
    if told := _gguf_field(lm, "general.license"):
        return told
    for source in (lm.name, lm.model.name_or_path or ""):
        try:
            card = Path(source, CARD)
            found = card if card.is_file() else try_to_load_from_cache(source, CARD)
            text = Path(found).read_text(encoding="utf-8") if isinstance(found, (str, Path)) else ""
            if text.startswith("---"):  # others have no metadata
                licence = ModelCard(text, ignore_metadata_errors=True).data.get("license")
                return licence if isinstance(licence, str) else None
        except (OSError, ValueError):  # no name of the hub, or a card that is none
            continue
    return None


def _gguf_field(lm: LM, key: str) -> str | None:
    """What the GGUF file that the model was opened from says in a field."""
    path = Path(lm.model.name_or_path or "")
    if not is_gguf(path):
        return None
    from reknow.export.gguf_files import GGUFFile  # what it needs is installed where such a file was opened

    return GGUFFile(path).text(key)


# --- files -----------------------------------------------------------------------------------------------------


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes `reknow.json` into a folder whose other files are whole, with their checksums."""
    files = {name: file_digest(folder / name) for name in _names(folder)}
    text = strict_json({**record, "files": files}, indent=1, ensure_ascii=False)
    (folder / MARK).write_text(text, encoding="utf-8")


def read_record(folder: Path) -> ExportRecord:
    """What the export in the folder says of itself.

    Raises:
        InputError: its record is broken, or of a later version.
    """
    return read_json(folder / MARK, ExportRecord, lambda error: refusal(folder, error))


def refusal(source: Path, error: Exception) -> InputError:
    """The error of a record that cannot be read."""
    if isinstance(error, NewerFormat):
        return InputError(f"expected an export of format {FORMAT}; {source} has {error}: upgrade reknow")
    return InputError(
        f"expected an export of reknow; what {source} says of itself cannot be read ({explain(error)}): export it "
        "again"
    )


def is_export(folder: Path) -> bool:
    """Whether `reknow export` wrote the folder."""
    return bool(marked_files(folder))


def changed_files(folder: Path, record: ExportRecord) -> list[str]:
    """The files that are not as they were written: gone, changed, or new."""
    present, gone = set(_names(folder)), set()
    with progress.stage("reading the files"):
        for name, wanted in record.files.items():
            if name not in present or file_digest(folder / name) != wanted:
                gone.add(name)
    return sorted(gone | (present - record.files.keys()))


def _names(folder: Path) -> Iterable[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MARK)
