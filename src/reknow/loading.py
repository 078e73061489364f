"""Models and tokenizers from a name, a path or a pair, with errors that say what to do."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from reknow.errors import InputError, ModelError, did_you_mean

DTYPES = ("float32", "bfloat16", "float16")


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of that name; None and a dtype come back as they are."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise did_you_mean("dtype", dtype, DTYPES)
    return getattr(torch, dtype)


def as_pair(source) -> tuple[PreTrainedModel, Any]:
    """The pair (model, tokenizer), the model without peft's wrapper; its adapters stay in its modules.

    Raises:
        InputError: it is no such pair.
        ModelError: the wrapper does more than to hold the model: it puts learned tokens before every text.
    """
    if isinstance(source, (tuple, list)) and len(source) == 2:
        model, tokenizer = _unwrapped(source[0]), source[1]
        if isinstance(model, PreTrainedModel) and isinstance(tokenizer, PreTrainedTokenizerBase):
            return model, tokenizer
    got = ", ".join(type(part).__name__ for part in (source if isinstance(source, (tuple, list)) else [source]))
    raise InputError(
        "expected the name or the folder of a model, or a pair (model, tokenizer) of transformers; "
        f"got {got}: give one of these"
    )


def _unwrapped(model):
    """The model inside peft's wrapper; anything else as it is."""
    if not _from_peft(model) or not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ModelError(
            "expected a model whose adapters lie in its modules; this one puts learned tokens before every text "
            f"({model.active_peft_config.peft_type.value}): edit its base, model.get_base_model()"
        )
    return model.get_base_model()


def carries_adapters(model: nn.Module) -> bool:
    """Whether modules of peft stand in the model, of whatever kind; `merge_and_unload` leaves none."""
    return any(_from_peft(module) for module in model.modules())


def _from_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def load(name: str, dtype, device, device_map, trust_remote_code: bool):
    """(model, tokenizer) of a name or path; float16 becomes float32 on a CPU unless a dtype is asked for."""
    options = dict(trust_remote_code=trust_remote_code)
    if name.startswith("demo:"):
        name = _demo_folder(name.removeprefix("demo:"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", device_map=device_map, **options)
    except torch.OutOfMemoryError:
        raise
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as e:
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise ModelError(
            f"expected a Hugging Face causal language model; {name!r} could not be loaded ({reason}): "
            "check the name or path, and that its files are whole"
        ) from e
    place(model, device, None)
    if dtype is None and model.dtype == torch.float16 and model.device.type == "cpu":
        model.float()
    return model, tokenizer


def _demo_folder(name: str) -> str:
    """Where the bundled model `name` lies."""
    folder = files("reknow") / "assets" / "models"
    known = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if name not in known:
        raise did_you_mean("demo model", name, known)
    return str(folder / name)


def place(model: PreTrainedModel, device, dtype: torch.dtype | None) -> None:
    """Moves and casts the model in place; None leaves it."""
    try:
        if device is not None or dtype is not None:
            model.to(device=device, dtype=dtype)  # type: ignore[call-overload]
        if dtype is not None:
            model.config.dtype = dtype  # what was asked for is what an export keeps
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"expected a device that is there; got {device!r} ({reason}): choose another") from error


def check_tokenizer(tokenizer, name: str, *, chat: bool) -> None:
    """Raises ModelError where the tokenizer does not know its tokens' characters, or lacks a chat template."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"expected a fast tokenizer, whose tokens know their characters; {name} has a slow one: "
            "load it with use_fast=True"
        )
    if chat and not tokenizer.chat_template:
        raise ModelError(f"expected a tokenizer with a chat template; {name} has none: use chat=False")
