"""A GGUF file as a folder of transformers: unpacked to float32 by transformers, with no trace of the quantisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    options = {"gguf_file": file.name, "local_files_only": True}
    with progress.stage("converting the model once", 3, unit="parts") as advance, bars_as_stages():
        with _as_model_error(file):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
            advance()
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **_unpacked(), **options)
        advance()
        for holder, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            vars(holder).pop(name, None)  # the weights are plain float32 now
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        advance()


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
