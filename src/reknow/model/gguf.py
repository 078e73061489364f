"""A GGUF file as a model of transformers, or as a folder of it: unpacked, with no trace of the quantisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from reknow.errors import ModelError
from reknow.model.bars import bars_as_stages
from reknow.progress import progress


def convert_gguf(file: Path, folder: Path) -> None:
    """Writes model and tokenizer of the file into the folder.

    Args:
        folder: an empty one.

    Raises:
        ModelError: transformers cannot read the file: it is damaged, or of an architecture that it does not know.
        OSError, SafetensorError: the folder cannot be written to.
    """
    with progress.stage("converting the model once", 3, unit="parts") as advance, bars_as_stages():
        tokenizer = open_tokenizer(file)
        advance()
        model = _open_model(file, torch.float32, None)
        advance()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        advance()


def open_gguf(file: Path, dtype: torch.dtype | None, device_map) -> PreTrainedModel:
    """The model in the file.

    Args:
        dtype: of the weights; None: float32.

    Raises:
        ModelError: transformers cannot read the file: it is damaged, or of an architecture that it does not know.
    """
    with bars_as_stages():
        model = _open_model(file, dtype or torch.float32, device_map)
    model.name_or_path = model.config._name_or_path = str(file)
    return model


def open_tokenizer(file: Path):
    """The tokenizer in the file; raises ModelError where transformers cannot read it."""
    with _as_model_error(file):
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)


def _open_model(file: Path, dtype: torch.dtype, device_map) -> Any:
    options = dict(gguf_file=file.name, local_files_only=True, device_map=device_map)
    with _as_model_error(file):
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **_unpacked(), **options)
    for holder, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        vars(holder).pop(name, None)  # the weights are plain numbers now
    return model


def _unpacked() -> dict:
    """What keeps a transformers that could compute with packed weights from doing so."""
    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


@contextmanager
def _as_model_error(file: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # the file may be broken in any way
        reason = " ".join(str(error).split()).rstrip(".:") or type(error).__name__
        raise ModelError(
            f"expected a GGUF file that transformers can read; {file.name} could not be read ({reason}): give a "
            "whole file of a decoder that transformers knows, or the model that it was made from"
        ) from error
