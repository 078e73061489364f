"""An edited model as a Hugging Face checkpoint."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from torch.nn import Parameter
from transformers import PROCESSOR_MAPPING, GenerationConfig, PreTrainedModel
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)

from reknow.edits import Edit
from reknow.errors import PatchError
from reknow.export.about import CARD, check_place, describe_export, write_record
from reknow.export.card import write_card
from reknow.export.measure import Answer, Measured, all_edits, ask, measure
from reknow.export.plain import find_adapters, merge_adapters, narrow_weights, replace_weights, rounded_weights
from reknow.files.atomic import atomic_write_folder
from reknow.lm import LM
from reknow.model.bars import bars_as_stages
from reknow.model.exclusive import typed_exclusively
from reknow.patching.record import check_weights
from reknow.progress import progress

_COMPANIONS = (
    IMAGE_PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    PROCESSOR_NAME,
    AUDIO_TOKENIZER_NAME,
    GENERATION_CONFIG_NAME,
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
)
"""Files beside a checkpoint that other programs need: processors (`AutoProcessor`, vLLM), the settings of generation,
chat templates, and the tokenizer as llama.cpp reads it."""


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint holds, and what rounding to its dtype did to the edits."""

    folder: Path
    dtype: torch.dtype
    edits: int
    """How many edits the applied patches make."""
    held: tuple[int, int] | None
    """How many of them the model answers, teacher-forced and exactly, as it is and as it was written; None: it was
    written bit for bit."""
    lost: float
    """The largest share of the norm of a base's matrix that rounding took from its sum with the changes."""
    measured: Measured
    """How the first edits are answered."""


@typed_exclusively
def export_checkpoint(lm: LM, folder: str | Path, *, overwrite: bool = False) -> CheckpointReport:
    """Writes the model as it is now, patches included, as a folder that `AutoModelForCausalLM` loads.

    Weights get the dtype of the base's checkpoint where the model was opened in a wider one without being asked to.
    Adapters of `peft` that are active in the model are added to its weights. Files of the base that only a processor
    reads are copied.

    Raises:
        PatchError: a memory is applied, which no checkpoint can hold.
        InputError: the folder exists and `overwrite` is off, or the disk is full (an old folder stays).
        PatchError: the changes are computed beside the weights, because those are quantised or offloaded; or the
            model has adapters that cannot be added to its weights.
    """
    check_weights(lm.patches, "export")
    adapted = find_adapters(lm.model)
    if left := [name for name in lm.unmerged if name not in adapted]:
        raise PatchError(
            f"expected weights that hold the change; {left[0]} has it unmerged, being quantised or offloaded: "
            "export an adapter, or load the model whole and in memory"
        )
    folder = check_place(lm, folder, overwrite)
    model = merge_adapters(lm) if adapted else lm.model
    narrow, lost = narrow_weights(lm, model)
    edits, measured = all_edits(lm), measure(lm)
    held = None
    if narrow or model is not lm.model:
        before, after = ask(lm, edits), _ask_rounded(lm, model, narrow, edits)
        held = sum(answer.said for answer in before), sum(answer.said for answer in after)
        measured = measured.as_written(after[: len(measured.edits)])
    written = replace_weights(model, narrow) if narrow else model

    def write(new: Path) -> None:
        _save(written, new)
        lm.tokenizer.save_pretrained(new)
        _copy_companions(lm, new)
        (new / CARD).write_text(write_card(lm, "hf", measured, [f"vllm serve {new.name}"]), encoding="utf-8")
        write_record(new, describe_export(lm, "hf", measured))

    made = atomic_write_folder(folder, write, overwrite)
    return CheckpointReport(made, written.dtype, len(edits), held, lost, measured)


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Writes the model, with its settings of generation as they are: transformers reads those that contradict each
    other, as many models have them, but does not write them."""
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with bars_as_stages(), progress.stage(f"writing {model.num_parameters():,} numbers"):
            model.save_pretrained(folder)
    finally:
        model.generation_config = settings
    if settings is not None:
        settings.to_json_file(folder / GENERATION_CONFIG_NAME)


def _ask_rounded(
    lm: LM, model: PreTrainedModel, narrow: dict[Parameter, Tensor], edits: Sequence[Edit]
) -> list[Answer]:
    """How `model` answers the edits with its weights rounded."""
    reader = lm if model is lm.model or not edits else LM((model, lm.tokenizer), chat=lm.chat)
    with rounded_weights(narrow):
        return ask(reader, edits)


def _copy_companions(lm: LM, folder: Path) -> None:
    """Copies what neither model nor tokenizer writes, from the base's folder or the hub's cache; warns where its
    processor has not been downloaded."""
    config, base = lm.model.config, lm.model.name_or_path or ""
    for name in _COMPANIONS:
        for source in dict.fromkeys((lm.name, base)):
            found = _find_file(source, name, getattr(config, "_commit_hash", None))
            if found is not None and not (folder / name).exists():
                shutil.copyfile(found, folder / name)
    lacks = not any((folder / name).exists() for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME))
    if lacks and type(config) in PROCESSOR_MAPPING and base and not os.path.isdir(base):
        warnings.warn(
            f"{lm.name} may have a processor, whose files are not on this machine: a program that gives it images "
            f"needs {IMAGE_PROCESSOR_NAME} and {PROCESSOR_NAME} of the base beside the exported files",
            stacklevel=4,
        )


def _find_file(source: str, name: str, revision: str | None) -> Path | None:
    """A file of a model's folder, or of a model of the hub that is on this machine; None where there is none."""
    if os.path.isdir(source):
        return Path(source, name) if Path(source, name).is_file() else None
    try:
        found = try_to_load_from_cache(source, name, revision=revision)
    except ValueError:  # no name of the hub
        return None
    return Path(found) if isinstance(found, str) else None
