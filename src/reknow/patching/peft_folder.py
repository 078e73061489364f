"""Low-rank changes as the folder that `peft` loads; a patch of the LoRA family is such a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from reknow.errors import PatchError
from reknow.files.atomic import atomic_write_folder
from reknow.files.outputs import check_replaced
from reknow.files.schema import Count, FormatError, explain, parse_json
from reknow.files.strict_json import strict_json
from reknow.files.tensors import check_finite, digest, read_tensors
from reknow.model.decoder import Decoder
from reknow.model.packaged import packaged_model
from reknow.model.parts import is_transposed
from reknow.patching.deltas import Delta, LowRank, check_factors
from reknow.patching.patch_files import read_patch, write_patch
from reknow.patching.record import PatchRecord

CONFIG, WEIGHTS, REST = "adapter_config.json", "adapter_model.safetensors", "reknow.patch"
"""The two files of `peft`, and what a patch has besides: edits, settings, the base's fingerprint."""
PREFIX, _RIGHT, _LEFT = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_RANKS = "reknow.ranks"
"""Metadata of the weights: the rank of each change before it was padded."""


def describe_base(lm: Decoder, names: Iterable[str]) -> dict:
    """What `peft` needs to know of the base model to change its matrices of these names.

    A model that was converted from a package is named by the model on the hub that it came from, which engines can
    open.
    """
    transposed = any(is_transposed(lm.model.get_submodule(name)) for name in names)
    packaged = packaged_model(lm.name, lm.model.name_or_path)
    named = (packaged and packaged.original) or lm.model.name_or_path or lm.name
    return {"base_model_name_or_path": named, "fan_in_fan_out": transposed}


def write_adapter(folder: Path, factors: Mapping[str, LowRank], base: Mapping) -> None:
    """Puts the adapter's two files into the folder.

    All factors get the largest rank, padded with zeros, and alpha equals it: `peft` divides alpha by the rank that
    the configuration names, llama.cpp by each tensor's own, and so both scale every product by 1.
    """
    rank = max(factor.rank for factor in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, factor in factors.items():
        missing = rank - factor.rank
        tensors[f"{PREFIX}{name}{_RIGHT}"] = pad(factor.right, (0, 0, 0, missing)).cpu().contiguous()  # (rank, in)
        tensors[f"{PREFIX}{name}{_LEFT}"] = pad(factor.left, (0, missing)).cpu().contiguous()  # (out, rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base["base_model_name_or_path"],
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(factors),
        "fan_in_fan_out": base["fan_in_fan_out"],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(strict_json(config, indent=1), encoding="utf-8")
    ranks = strict_json({name: factor.rank for name, factor in factors.items()})
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", _RANKS: ranks})


def write_folder(patch: PatchRecord, folder: str | Path) -> Path:
    """Writes a patch whose notes name its base for `peft` as such a folder; an old one stays until this is whole.

    Raises:
        InputError: the folder holds something else, which would be lost; or it cannot be written.
    """
    check_replaced(Path(folder), own_files(folder))
    factors = {name: delta for name, delta in patch.deltas.items() if isinstance(delta, LowRank)}

    def write(new: Path) -> None:
        write_adapter(new, factors, patch.notes["adapter"])
        # Read again, so that the digest is of what lies there, whatever way it was written.
        sealed = read_tensors(new / WEIGHTS)
        write_patch(replace(patch, deltas={}), new / REST, companion=digest(sealed.metadata, sealed.tensors))

    return atomic_write_folder(folder, write, overwrite=True)


def is_adapter(path: str | Path) -> bool:
    """Whether this is a folder that `write_folder` wrote."""
    return (Path(path) / REST).is_file()


def own_files(path: str | Path) -> set[str]:
    """What `write_folder` has written into this folder; nothing where it has not."""
    return {CONFIG, WEIGHTS, REST} if is_adapter(path) else set()


def read_folder(folder: str | Path) -> PatchRecord:
    """The patch in such a folder.

    Raises:
        PatchError: its files are missing or broken.
    """
    folder = Path(folder)
    try:
        sealed = read_tensors(folder / WEIGHTS)
        check_finite(sealed.tensors)
        ranks = parse_json(dict[str, Count], sealed.metadata.get(_RANKS, "{}"), once=True)
        deltas: dict[str, Delta] = {}
        for key in sealed.tensors:
            name = key.removeprefix(PREFIX).removesuffix(_RIGHT).removesuffix(_LEFT)
            padded = check_factors(name, sealed.tensors, f"{PREFIX}{name}{_LEFT}", f"{PREFIX}{name}{_RIGHT}")
            rank = ranks.get(name)  # None: a folder from before ranks were padded
            deltas[name] = LowRank(padded.left[:, :rank].contiguous(), padded.right[:rank].contiguous())
    except (OSError, FormatError) as error:
        raise PatchError(
            f"expected an adapter in {folder}; {WEIGHTS} is broken ({explain(error)}): restore it"
        ) from error
    rest = read_patch(folder / REST, companion=digest(sealed.metadata, sealed.tensors))
    return replace(rest, deltas=deltas)
