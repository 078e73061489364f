"""Patch files: a safetensors file, whose header carries as JSON what is no tensor; checked once, when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, FailFast, Field, JsonValue
from torch import Tensor

from reknow.checks.bounds import current_names
from reknow.edits import Edit
from reknow.errors import PatchError, ReknowError
from reknow.files.schema import (
    FormatError,
    Listed,
    NewerFormat,
    Object,
    Strict,
    check_fields,
    explain,
    parse_json,
)
from reknow.files.tensors import (
    HEADER,
    Sealed,
    check_finite,
    check_tensor,
    read_tensors,
    write_tensors,
)
from reknow.model.fingerprint import Fingerprint
from reknow.patching.kept import Kept
from reknow.patching.patches import FORMAT, Delta, Dense, Kind, LowRank, Patch
from reknow.registry import METHODS

LONGEST = 200
"""Characters of a name."""
MERGED = "merged"
"""Stands for the method of a patch that was merged from those of several."""
BESIDE = "beside"
"""Under which text a file keeps the digest of another one that belongs to it."""

Name = Annotated[str, Field(min_length=1, max_length=LONGEST)]


def _of_torch(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError("expected the name of a dtype")
    return name


class Base(Strict):
    """What a file says of the model that it belongs to; the samples of its weights are a tensor."""

    structure: Name
    tokenizer: Name
    dtype: Annotated[str, AfterValidator(_of_torch)]

    def fingerprint(self, tensors: dict[str, Tensor]) -> Fingerprint:
        """With the samples, which are taken out of the tensors; raises FormatError where they are none."""
        samples = check_tensor("base.samples", tensors.pop("base.samples", None), "float32", 1)
        return Fingerprint(self.structure, self.tokenizer, self.dtype, samples)


class _Conflict(Strict):
    prompt: str
    old: str
    new: str


class _Adapter(Strict):
    base_model_name_or_path: str
    fan_in_fan_out: bool


class _Notes(Strict):
    """Those notes that anything reads; the others are for people."""

    open: ClassVar[bool] = True

    conflicts: Listed[_Conflict] = Field(default_factory=list)
    adapter: _Adapter | None = None


def _noted(notes: dict[str, JsonValue]) -> dict[str, JsonValue]:
    _Notes.model_validate(notes)
    return notes


class Header(Strict):
    """The JSON text of a patch file."""

    format: Annotated[int, Field(ge=1, le=FORMAT)]
    kind: Kind
    method: Name
    settings: Object
    edits: Annotated[tuple[Edit, ...], FailFast()]
    made_on: Annotated[tuple[Name, ...], FailFast()]
    notes: Annotated[dict[str, JsonValue], AfterValidator(_noted)]
    version: str
    base: Base
    follows: Name | None = None
    memory: Object = Field(default_factory=dict)


def write_patch(patch: Patch, path: str | Path, *, beside: str | None = None) -> Path:
    """Writes one file; an old one stays until it is whole.

    Args:
        beside: the digest of another file that belongs to this patch.
    """
    texts = {HEADER: json.dumps(patch._header())}
    if beside is not None:
        texts[BESIDE] = beside
    return write_tensors(path, patch._tensors(), texts)


def read_patch(path: str | Path, *, beside: str | None = None) -> Patch:
    """The patch in a file that `write_patch` wrote, of this or an older version.

    Args:
        beside: the digest of the other file, as it is now.

    Raises:
        PatchError: there is no such file, or it holds something else than it should.
    """
    try:
        sealed = read_tensors(path)
        if beside is not None and sealed.metadata.get(BESIDE, beside) != beside:
            raise FormatError("the file of tensors beside it is that of another patch, or damaged")
        return _patch(sealed)
    except NewerFormat as error:
        raise PatchError(f"expected patch format {FORMAT}; {path} has {error}: upgrade reknow") from error
    except (OSError, ReknowError, FormatError) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else f"it is none ({explain(error)})"
        raise PatchError(f"expected a patch file at {path}; {why}: give a file that `save` wrote") from error


def _patch(sealed: Sealed) -> Patch:
    header, tensors = parse_json(Header, sealed.header, once=True), dict(sealed.tensors)
    check_finite(tensors)
    base = header.base.fingerprint(tensors)
    state = {name.removeprefix("state."): tensors.pop(name) for name in list(tensors) if name.startswith("state.")}
    deltas = read_deltas(tensors)
    if header.kind != "weights" and (deltas or not header.edits):
        raise FormatError("a memory has edits, and changes no weights")
    if header.kind == "weights" and (header.memory or header.follows):
        raise FormatError("a change of weights continues no memory")
    patch = Patch(
        method=header.method,
        settings=header.settings,
        edits=header.edits,
        deltas=deltas,
        base=base,
        made_on=header.made_on,
        state=state,
        kind=header.kind,
        follows=header.follows,
        memory=header.memory,
        notes=header.notes,
        version=header.version,
    )
    if (kept := kept_by(patch)) is not None:
        sizes = {"edits": len(patch.edits)}
        for name, delta in deltas.items():
            sizes |= {f"out.{name}": delta.shape[0], f"in.{name}": delta.shape[1]}
        kept.check(patch.state, patch.memory, current_names(METHODS[patch.method].method, patch.settings), sizes)
    return patch


def read_deltas(tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    """ΔW by matrix name from `delta.NAME.dense`, or `.left` and `.right`.

    Raises:
        FormatError: a part is missing, or the parts do not fit.
    """
    deltas: dict[str, Delta] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix("delta.").rpartition(".")
        if not key.startswith("delta.") or not name or part not in ("dense", "left", "right"):
            raise FormatError(f"tensor {key[:80]}: a patch has none of this name")
        check_tensor(key, tensor, "float", 2)
        if part == "dense":
            if f"delta.{name}.left" in tensors:
                raise FormatError(f"{name} is changed by a matrix and by factors")
            deltas[name] = Dense(tensor)
        else:
            left, right = (check_tensor(p, tensors.get(p), "float", 2) for p in _factors(name))
            deltas[name] = low_rank(name, left, right)
    return deltas


def _factors(name: str) -> tuple[str, str]:
    return f"delta.{name}.left", f"delta.{name}.right"


def low_rank(name: str, left: Tensor, right: Tensor) -> LowRank:
    """ΔW as a product; raises FormatError where the factors are of different rank."""
    if left.shape[1] != right.shape[0]:
        raise FormatError(f"the factors of {name} have ranks {left.shape[1]} and {right.shape[0]}")
    return LowRank(left, right)


def kept_by(patch: Patch) -> Kept | None:
    """What the patch's method says that its patches keep; None where it says nothing.

    Raises:
        FormatError: it is a memory of a method that this library does not have, or not of its kind.
    """
    if patch.kind == "weights" and not patch.state:
        return None  # the matrices are all there is, and importing the methods takes seconds
    entry = METHODS.get(patch.method)
    if entry is None:
        if patch.kind != "weights":
            raise FormatError(f"{patch.method!r} is no method that this version has, so nothing could run its memory")
        return None
    if (kind := entry.method.kind) != patch.kind:
        raise FormatError(f"it is said to be a {patch.kind} of {patch.method}, whose patches are of the kind {kind}")
    check_fields(entry.method, current_names(entry.method, patch.settings), "settings")
    return entry.method.kept
