"""Models and tokenizers from a name, a path or a pair, with errors that say what to do."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from reknow.errors import InputError, MissingExtra, ModelError, ReknowError, did_you_mean
from reknow.model.bars import bars_as_stages
from reknow.model.fast_modules import align_weights
from reknow.model.gguf import open_gguf, open_tokenizer
from reknow.model.sources import CONFIG, Source, find_source, readable

_DTYPES = ("float32", "bfloat16", "float16")
_WHOLE = "check that its files are whole"


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of that name; None and a dtype come back as they are."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise did_you_mean("dtype", dtype, _DTYPES)
    return getattr(torch, dtype)


def _as_pair(source) -> tuple[PreTrainedModel, Any]:
    """The pair (model, tokenizer), the model without peft's wrapper; its adapters stay in its modules.

    Raises:
        InputError: it is no such pair.
        ModelError: the wrapper does more than to hold the model: it puts learned tokens before every text; or the
            weights are split among processes.
    """
    if isinstance(source, (tuple, list)) and len(source) == 2:
        model, tokenizer = _unwrap(source[0]), source[1]
        if isinstance(model, PreTrainedModel) and isinstance(tokenizer, PreTrainedTokenizerBase):
            _refuse_split(model)
            return model, tokenizer
    got = ", ".join(type(part).__name__ for part in (source if isinstance(source, (tuple, list)) else [source]))
    raise InputError(
        "expected the name or the folder of a model, or a pair (model, tokenizer) of transformers; "
        f"got {got}: give one of these"
    )


def _refuse_split(model: PreTrainedModel) -> None:
    """Raises ModelError where a weight is a DTensor, of which each process has a part (tensor parallel, FSDP): keys
    would be parts of keys."""
    split = [name for name, weight in model.named_parameters() if hasattr(weight, "device_mesh")]
    if split:
        raise ModelError(
            f"expected weights that this process has whole; {type(model).__name__} has {len(split)} that are split "
            f"among processes, such as {split[0]}: open the model in one process, where device_map='auto' spreads "
            "its layers over the GPUs, edit it there, and give the engine that splits it the export"
        )


def _unwrap(model):
    """The model inside peft's wrapper; anything else as it is."""
    if not _from_peft(model) or not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise _learned_tokens(model.active_peft_config, "model.get_base_model()")
    return model.get_base_model()


def _learned_tokens(config, base: str) -> ModelError:
    return ModelError(
        "expected a model whose adapters lie in its modules; this one puts learned tokens before every text "
        f"({config.peft_type.value}): edit its base, {base}"
    )


def carries_adapters(model: nn.Module) -> bool:
    """Whether modules of peft stand in the model, of whatever kind; `merge_and_unload` leaves none."""
    return any(_from_peft(module) for module in model.modules())


def _from_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


def open_model(source, tokenizer, dtype, device, device_map, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) of a name, a folder or a pair; float16 becomes float32 on a CPU unless a dtype is asked for.

    Raises:
        InputError: the source, the tokenizer, the dtype or the device is none.
        ModelError: it cannot be loaded, or is of a kind that is not handled.
    """
    dtype, device = _as_dtype(dtype), _as_device(device)
    if isinstance(source, (str, Path)):
        return _load(str(source), tokenizer, dtype, device, device_map, trust_remote_code)
    if tokenizer is not None:
        raise InputError(f"expected the tokenizer of a pair in the pair; got tokenizer={tokenizer!r}: leave it out")
    model, tokenizer = _as_pair(source)
    _move(model, device, dtype)
    return model, tokenizer


def _load(name: str, tokenizer, dtype, device, device_map, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
    with readable(find_source(name)) as source:
        return _load_source(name, source, tokenizer, dtype, device, device_map, trust_remote_code)


def _load_source(
    name: str, source: Source, tokenizer, dtype, device, device_map, trust_remote_code: bool
) -> tuple[PreTrainedModel, Any]:
    if source.gguf:
        model = open_gguf(Path(source.name), dtype, device_map)
        tokenizer = _load_tokenizer(name, source, tokenizer, trust_remote_code)
        _move(model, device, None)
        align_weights(model)
        return model, tokenizer
    expected = f"expected a model that transformers can load; {name!r} could not be loaded"
    with _as_model_error(expected, _WHOLE):
        base = _find_base(name, source)
        options: dict[str, Any] = dict(trust_remote_code=trust_remote_code, local_files_only=base.offline)
        kind = _choose_auto_class(name, AutoConfig.from_pretrained(base.name, **options), trust_remote_code)
    tokenizer = _load_tokenizer(name, source, tokenizer, trust_remote_code)
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # both are refused below, by name
    with _as_model_error(expected, _WHOLE), bars_as_stages():
        model, report = kind.from_pretrained(source.name, dtype=dtype or "auto", device_map=device_map, **options)
    missing = sorted(report["missing_keys"]) or sorted(key for key, *_ in report["mismatched_keys"])
    if missing:
        raise ModelError(
            f"expected all weights of {type(model).__name__}; the files of {name!r} lack {len(missing)} or have them "
            f"in another size, such as {missing[0]}: {_WHOLE}"
        )
    _move(model, device, None)
    if dtype is None and model.dtype == torch.float16 and model.device.type == "cpu":
        model.float()
    align_weights(model)
    return model, tokenizer


def _find_base(name: str, source: Source) -> Source:
    """The model itself, or the one that it is an adapter for."""
    adapter = find_adapter_config_file(source.name, local_files_only=source.offline)
    if adapter is None or Path(adapter).with_name(CONFIG).is_file():
        return source
    if not is_peft_available():
        raise MissingExtra("peft", "lora", f"the adapter {name}")
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(Path(adapter).parent))
    base = config.base_model_name_or_path
    if not base:
        raise ModelError(f"expected an adapter that names its base model; {name} names none: {_WHOLE}")
    if config.is_prompt_learning:
        raise _learned_tokens(config, base)
    base_source = find_source(base)
    return replace(base_source, offline=base_source.offline or source.offline)


def _choose_auto_class(name: str, config: PreTrainedConfig, own_code: bool) -> Any:
    """What transformers loads the model with: as a causal language model, or as one that reads images too.

    Raises:
        ModelError: it is neither.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"expected a decoder; {name} is an encoder-decoder ({config.model_type}): choose a model of a family "
            "listed in docs/models.md"
        )
    mappings: dict[Any, Any] = {
        AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    }
    if own_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return AutoModelForCausalLM
    named = config.architectures or []
    kinds = [kind for kind, mapping in mappings.items() if type(config) in mapping]
    kinds.sort(key=lambda kind: mappings[kind][type(config)].__name__ not in named)  # first what the files are of
    if not kinds:
        what = ", ".join([config.model_type, *named])
        raise ModelError(
            f"expected a language model; {name} is another kind of model ({what}): choose one of a family listed in "
            "docs/models.md"
        )
    return kinds[0]


def _load_tokenizer(name: str, source: Source, wanted, trust_remote_code: bool):
    """The tokenizer that is given or named, or the model's own."""
    if isinstance(wanted, PreTrainedTokenizerBase):
        return wanted
    if wanted is not None:
        with readable(find_source(str(wanted))) as other:
            return _load_tokenizer(str(wanted), other, None, trust_remote_code)
    if source.gguf:
        return open_tokenizer(Path(source.name))
    options = dict(trust_remote_code=trust_remote_code, local_files_only=source.offline)
    with _as_model_error(
        f"expected a tokenizer that transformers can load; that of {name!r} could not be loaded",
        "name one with tokenizer= (--tokenizer NAME)",
    ):
        return AutoTokenizer.from_pretrained(source.name, **options)


@contextmanager
def _as_model_error(expected: str, remedy: str):
    """Turns whatever transformers raises while it reads foreign files into one sentence with the whole reason."""
    try:
        yield
    except (ReknowError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # files may be broken in any way
        reason = " ".join(str(error).split()).rstrip(".:") or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"{reason} is not there"
        if "trust_remote_code" in reason:
            remedy = "allow it to run its own code with trust_remote_code=True (--trust-remote-code) if you trust it"
        if "weights_only" in reason:  # torch's own reason would have the user switch that off
            reason, remedy = (
                "its pickled weights hold more than tensors, which could run code",
                "give safetensors files",
            )
        raise ModelError(f"{expected} ({reason}): {remedy}") from error


def _as_device(device) -> torch.device | None:
    """The device of that name; None comes back as it is.

    Raises:
        InputError: there is none of that name, or this torch cannot compute on it.
    """
    if device is None:
        return None
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).tolist()  # a name may be known and nothing behind it
    except (RuntimeError, AssertionError, ValueError, TypeError, ImportError, AttributeError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
        raise InputError(
            f"expected a device that is there; got {device!r} ({reason}): choose another, such as cpu"
        ) from error
    return chosen


def _move(model: PreTrainedModel, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Moves and casts the model in place; None leaves it."""
    if device is None and dtype is None:
        return
    try:
        model.to(device=device, dtype=dtype)  # type: ignore[call-overload]
        if dtype is not None:
            model.config.dtype = dtype  # what was asked for is what an export keeps
    except ValueError as error:  # quantised ones stay where they are
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"expected a model that can be moved and cast; {type(model).__name__} cannot ({reason}): leave dtype and "
            "device out"
        ) from error


def check_tokenizer(tokenizer, name: str) -> None:
    """Raises ModelError where the tokenizer does not know its tokens' characters."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"expected a fast tokenizer, whose tokens know their characters; {name} has a slow one: "
            "give a fast one, with tokenizer= (--tokenizer NAME) or in the pair"
        )
