"""A GGUF file of the base with the applied patches in it: edited tensors changed, all other bytes as they were."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from reknow.errors import ModelError, PatchError
from reknow.export.about import describe_export
from reknow.export.adapter import check_exportable
from reknow.export.card import write_card
from reknow.export.gguf_files import GGUFFile, NewTensor, fill_note
from reknow.export.gguf_match import check_match, read_tensor
from reknow.export.gguf_names import Place, as_rows
from reknow.export.gguf_record import CARD_FIELD, RECORD_FIELD
from reknow.export.measure import LOST, Answer, Measured, ask, measure
from reknow.files.atomic import atomic_write
from reknow.files.outputs import output_file
from reknow.files.strict_json import strict_json
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.exclusive import typed_exclusively
from reknow.patching.deltas import Delta, add_deltas
from reknow.patching.patches import merge
from reknow.progress import progress

_OWN = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q8_0,
)
"""Types in which an edited tensor may stay. Blocks of 4 and 5 bits cannot hold what a change of low rank adds: its
few large numbers set the scale of their block."""
_RAISED, _BLOCK = GGMLQuantizationType.Q8_0, 32
_WIDER = (GGMLQuantizationType.F16, GGMLQuantizationType.F32)


@dataclass(frozen=True)
class GGUFReport:
    """What was changed in a GGUF file, and how the edits are answered there."""

    file: Path
    tensors: dict[str, tuple[str, str]]
    """The edited tensors with their type before and after."""
    measured: Measured
    not_asked: str | None = None
    """Why the written file was not asked; None: it was."""


@typed_exclusively
def export_gguf(lm: LM, base: str | Path, out: str | Path, *, overwrite: bool = False) -> GGUFReport:
    """Writes the GGUF file `base` anew with the applied patches in it, and asks the edits' prompts of the result.

    Edited tensors keep their type where that is F32, F16, BF16 or Q8_0; others become Q8_0. Where rounding the sum to
    that type would cost much of the weights themselves, the tensor becomes F16, or F32 if that is not enough. The
    bytes of all other tensors and fields stay; the fields `reknow.json` and `reknow.card` say what was changed. The
    file is copied block by block, so that only the tensor in hand is in memory.

    Args:
        base: a GGUF file of the model that the patches were made on, in whatever quantisation.

    Raises:
        PatchError: no patch is applied, one is a memory, `base` is of another model or lacks a tensor, the model's
            layout in llama.cpp is not known, or a sum is no number of float32.
        ModelError: `base` is no whole GGUF file.
        InputError: `out` exists and `overwrite` is off, or the disk is full (an old file stays).
    """
    check_exportable(lm)
    out = output_file(Path(out), overwrite, (base, lm.name, lm.model.name_or_path))
    file, deltas = GGUFFile(Path(base)), merge(lm.patches).deltas
    places = check_match(lm, file, deltas)
    new = {}
    for name, place in progress.each("choosing types", places.items(), unit="tensors"):
        kind = _choose_type(file, place, deltas[name])
        new[place.tensor] = NewTensor(kind, partial(_edited, file, place, deltas[name], kind))
    measured, why = measure(lm), list[str]()

    def write(path: str) -> None:
        nonlocal measured
        # The file is asked before it takes its place, and what it says goes into the room that is kept for it.
        room = measured.as_written([Answer(1e-300, False)] * len(measured.edits))
        spans = file.write_with(Path(path), new, _notes(lm, file, room, out, roomy=True))
        try:
            measured = measured.as_written(_ask_file(path, lm, measured))
        except ModelError as error:
            why.append(str(error))
        for name, text in _notes(lm, file, measured, out).items():
            fill_note(Path(path), spans[name], text)

    atomic_write(out, write)
    tensors = {name: (file.tensors[name].tensor_type.name, each.kind.name) for name, each in new.items()}
    return GGUFReport(out, tensors, measured, why[0] if why else None)


def _ask_file(path: str, lm: LM, measured: Measured) -> list[Answer]:
    """How the model in the file answers; raises ModelError where transformers cannot read its architecture."""
    return ask(LM(path, chat=lm.chat), measured.edits)


def _notes(lm: LM, file: GGUFFile, measured: Measured, out: Path, *, roomy: bool = False) -> dict[str, str]:
    record: dict[str, Any] = describe_export(lm, "gguf", measured)
    record["from"] = {"file": file.path.name, "bytes": file.path.stat().st_size, "patches": _earlier(file)}
    texts = {
        RECORD_FIELD: strict_json(record, ensure_ascii=False),
        CARD_FIELD: write_card(lm, "gguf", measured, [f"llama-server -m {out.name}"]),
    }
    room = " " * (64 + 32 * len(measured.edits)) if roomy else ""
    return {name: text + room for name, text in texts.items()}


def _earlier(file: GGUFFile) -> list[str]:
    """Ids of the patches that are in the file already, by what it says of itself."""
    try:
        return [str(patch["id"]) for patch in json.loads(file.text(RECORD_FIELD) or "{}").get("patches", [])]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def _choose_type(file: GGUFFile, place: Place, delta: Delta) -> GGMLQuantizationType:
    """The type in which an edited tensor is written; raises PatchError where float32 cannot hold the sum."""
    tensor, matrix = file.tensors[place.tensor], read_tensor(file, place.tensor)
    wanted, own = _add(matrix, place, delta), tensor.tensor_type
    if not bool(wanted.isfinite().all()):
        raise PatchError(
            f"expected sums that are numbers; {place.tensor} with the change overflows: take the patch with the "
            "largest change off"
        )
    first = [own] if own in _OWN else [_RAISED] if int(tensor.shape[0]) % _BLOCK == 0 else []
    for kind in (*first, *_WIDER):
        held = torch.from_numpy(np.array(quants.dequantize(_store(wanted, kind), kind), dtype=np.float32))
        if float((held - wanted).norm()) <= LOST * float(matrix.norm()):
            return kind
    return _WIDER[-1]


def _edited(file: GGUFFile, place: Place, delta: Delta, kind: GGMLQuantizationType) -> np.ndarray:
    """The file's tensor plus the change, as it is written."""
    return _store(_add(read_tensor(file, place.tensor), place, delta), kind)


def _add(matrix: Tensor, place: Place, delta: Delta) -> Tensor:
    """The sum in float32; the file's rows may lie in another order than transformers'. (out, in)"""
    summed = exact(matrix)
    return as_rows(summed + place.arrange(add_deltas(torch.zeros_like(summed), [delta])))


def _store(matrix: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    with np.errstate(all="ignore"):  # blocks that are zero; numbers that are too large, which are refused
        return quants.quantize(matrix.numpy(), kind)
