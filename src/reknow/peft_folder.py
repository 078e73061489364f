"""Low-rank changes as the folder that `peft` loads; a patch of the LoRA family is such a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reknow.errors import InputError, PatchError
from reknow.files import folder_aside
from reknow.patches import Delta, LowRank, Patch

if TYPE_CHECKING:
    from reknow.lm import LM

CONFIG, WEIGHTS, REST = "adapter_config.json", "adapter_model.safetensors", "reknow.patch"
"""The two files of `peft`, and what a patch has besides: edits, settings, the base's fingerprint."""
PREFIX, RIGHT, LEFT = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def base_of(lm: LM, conv: bool) -> dict:
    """What `peft` needs to know of the base model; `conv`: its matrices are stored as (in, out)."""
    return {"base_model_name_or_path": lm.model.name_or_path or lm.name, "fan_in_fan_out": conv}


def write_adapter(folder: Path, factors: Mapping[str, LowRank], base: Mapping) -> None:
    """Puts the adapter's two files into the folder; alpha equals the rank, so that `peft` scales the product by 1."""
    tensors: dict[str, Tensor] = {}
    for name, factor in factors.items():
        tensors[f"{PREFIX}{name}{RIGHT}"] = factor.right.contiguous()  # (rank, in)
        tensors[f"{PREFIX}{name}{LEFT}"] = factor.left.contiguous()  # (out, rank)
    ranks = {name: factor.rank for name, factor in factors.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base["base_model_name_or_path"],
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": base["fan_in_fan_out"],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def save(patch: Patch, folder: str | Path) -> Path:
    """Writes a patch whose notes name its base for `peft` as such a folder; an old one stays until this is whole.

    Raises:
        InputError: the folder holds something else, which would be lost; or it cannot be written.
    """
    if Path(folder).is_dir() and not is_adapter(folder) and any(Path(folder).iterdir()):
        raise InputError(
            "expected a new folder, or one with an adapter that reknow saved, since its contents are replaced; "
            f"{folder} holds something else: choose another name"
        )
    factors = {name: delta for name, delta in patch.deltas.items() if isinstance(delta, LowRank)}

    def write(aside: Path) -> None:
        write_adapter(aside, factors, patch.notes["adapter"])
        replace(patch, deltas={}).save_file(aside / REST)

    return folder_aside(folder, write, overwrite=True)


def is_adapter(path: str | Path) -> bool:
    """Whether this is a folder that `save` wrote."""
    return (Path(path) / REST).is_file()


def load(folder: str | Path) -> Patch:
    """The patch in such a folder.

    Raises:
        PatchError: its files are missing or broken.
    """
    folder = Path(folder)
    rest = Patch.load(folder / REST)
    try:
        tensors = load_file(folder / WEIGHTS)
        names = [key.removeprefix(PREFIX).removesuffix(RIGHT) for key in tensors if key.endswith(RIGHT)]
        deltas: dict[str, Delta] = {
            name: LowRank(tensors[f"{PREFIX}{name}{LEFT}"], tensors[f"{PREFIX}{name}{RIGHT}"]) for name in names
        }
    except (OSError, SafetensorError, KeyError) as error:
        raise PatchError(f"expected an adapter in {folder}; {WEIGHTS} is broken ({error}): restore it") from error
    return replace(rest, deltas=deltas)
