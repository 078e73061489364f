"""Patch files: a safetensors file, whose header carries as JSON what is no tensor; checked once, when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, FailFast, Field, JsonValue
from torch import Tensor

from reknow.checks.bounds import current_names
from reknow.edits import Edit
from reknow.errors import PatchError, ReknowError
from reknow.files.schema import FormatError, Listed, NewerFormat, Object, Strict, check_fields, explain
from reknow.files.tensors import Sealed, check_tensor, read_tensors, write_tensors
from reknow.model.fingerprint import Fingerprint
from reknow.patching.deltas import read_deltas
from reknow.patching.record import FORMAT, PatchKind, PatchRecord
from reknow.registry import METHODS

_COMPANION = "beside"
"""The name of the text in which a file keeps the digest of another one that belongs to it."""

Name = Annotated[str, Field(min_length=1, max_length=200)]


def _check_dtype(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError("expected the name of a dtype")
    return name


class Base(Strict):
    """What a file says of the model that it belongs to; the samples of its weights are a tensor."""

    structure: Name
    tokenizer: Name
    dtype: Annotated[str, AfterValidator(_check_dtype)]

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


def _check_notes(notes: dict[str, JsonValue]) -> dict[str, JsonValue]:
    _Notes.model_validate(notes)
    return notes


class _Header(Strict):
    """The JSON text of a patch file."""

    format: Annotated[int, Field(ge=1, le=FORMAT)]
    kind: PatchKind
    method: Name
    settings: Object
    edits: Annotated[tuple[Edit, ...], FailFast()]
    made_on: Annotated[tuple[Name, ...], FailFast()]
    notes: Annotated[dict[str, JsonValue], AfterValidator(_check_notes)]
    version: str
    base: Base
    follows: Name | None = None
    memory: Object = Field(default_factory=dict)


def write_patch(patch: PatchRecord, path: str | Path, *, companion: str | None = None) -> Path:
    """Writes one file; an old one stays until it is whole.

    Args:
        companion: the digest of another file that belongs to this patch.
    """
    texts = {} if companion is None else {_COMPANION: companion}
    return write_tensors(path, patch.tensors(), texts, header=patch.header())


def read_patch(path: str | Path, *, companion: str | None = None) -> PatchRecord:
    """The patch in a file that `write_patch` wrote, of this or an older version.

    Args:
        companion: the digest of the other file, as it is now.

    Raises:
        PatchError: there is no such file, or it holds something else than it should.
    """
    try:
        sealed = read_tensors(path)
        if companion is not None and sealed.metadata.get(_COMPANION, companion) != companion:
            raise FormatError("the file of tensors beside it is that of another patch, or damaged")
        return _read(sealed)
    except NewerFormat as error:
        raise PatchError(f"expected patch format {FORMAT}; {path} has {error}: upgrade reknow") from error
    except (OSError, ReknowError, FormatError) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else f"it is none ({explain(error)})"
        raise PatchError(f"expected a patch file at {path}; {why}: give a file that `save` wrote") from error


def _read(sealed: Sealed) -> PatchRecord:
    header, tensors = sealed.header(_Header), dict(sealed.tensors)
    base = header.base.fingerprint(tensors)
    state = {name.removeprefix("state."): tensors.pop(name) for name in list(tensors) if name.startswith("state.")}
    deltas = read_deltas(tensors)
    if header.kind != "weights" and (deltas or not header.edits):
        raise FormatError("a memory has edits, and changes no weights")
    if header.kind == "weights" and (header.memory or header.follows):
        raise FormatError("a change of weights continues no memory")
    values = {name: getattr(header, name) for name in _Header.model_fields if name not in ("format", "base")}
    patch = PatchRecord(**values, base=base, deltas=deltas, state=state)
    _check_state(patch)
    return patch


def _check_state(patch: PatchRecord) -> None:
    """Raises FormatError where a patch keeps something else than its method says, or is a memory of none that this
    library has."""
    if patch.kind == "weights" and not patch.state:
        return  # the matrices are all there is, and importing the methods takes seconds
    entry = METHODS.get(patch.method)
    if entry is None:
        if patch.kind != "weights":
            raise FormatError(f"{patch.method!r} is no method that this version has, so nothing could run its memory")
        return
    method = entry.method
    if method.kind != patch.kind:
        raise FormatError(
            f"it is said to be a {patch.kind} of {patch.method}, whose patches are of the kind {method.kind}"
        )
    settings = current_names(method, patch.settings)
    check_fields(method, settings, "settings")
    if method.state_spec is not None:
        sizes = {"edits": len(patch.edits)}
        for name, delta in patch.deltas.items():
            sizes |= {f"out.{name}": delta.shape[0], f"in.{name}": delta.shape[1]}
        method.state_spec.check(patch.state, patch.memory, settings, sizes)
