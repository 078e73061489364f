"""An edited model for programs that do not know reknow: a Hugging Face checkpoint, or a PEFT LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reknow.adapter import Conv1D
from reknow.errors import InputError, PatchError
from reknow.files import folder_aside
from reknow.patches import LowRank, check_weights, factored, merge
from reknow.peft_folder import base_of, write_adapter

if TYPE_CHECKING:
    from reknow.lm import LM


@dataclass(frozen=True)
class LoraReport:
    """What an adapter holds and what it lost."""

    folder: Path
    ranks: dict[str, int]
    """Rank by matrix name."""
    error: float
    """Relative Frobenius error of the worst matrix; 0 unless it was truncated."""


def export_checkpoint(lm: LM, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Writes the model as it is now, patches included, as a folder that `AutoModelForCausalLM` loads.

    Raises:
        PatchError: a memory is applied, which no checkpoint can hold.
        InputError: the folder exists and `overwrite` is off, or the disk is full (an old folder stays).
        PatchError: the changes are computed beside the weights, because those are quantised or offloaded.
    """
    check_weights(lm.patches, "export")
    if lm.beside:
        raise PatchError(
            f"expected weights that hold the change; {lm.beside[0]} has it beside, being quantised or offloaded: "
            "export an adapter, or load the model whole and in memory"
        )

    def write(aside: Path) -> None:
        lm.model.save_pretrained(aside)
        lm.tokenizer.save_pretrained(aside)

    return folder_aside(folder, write, overwrite)


def export_lora(
    lm: LM, folder: str | Path, *, max_rank: int | None = None, truncate: bool = False, overwrite: bool = False
) -> LoraReport:
    """Writes the applied patches as one PEFT LoRA adapter for the base model.

    Args:
        max_rank: largest rank allowed; None: 64.
        truncate: cut a higher rank by SVD instead of refusing it; the report says what that loses.

    Raises:
        PatchError: no patch is applied, one is a memory, or a change has a higher rank than `max_rank`.
        InputError: `max_rank` is below 1, the folder exists and `overwrite` is off, or the disk is full (an old
            folder stays).
    """
    if not lm.patches:
        raise PatchError("expected at least one applied patch to export; got none: apply a patch first")
    limit = 64 if max_rank is None else max_rank
    if limit < 1:
        raise InputError(f"expected a max_rank of at least 1; got {limit}: raise it")
    factors: dict[str, LowRank] = {}
    error = 0.0
    for name, delta in merge(lm.patches).deltas.items():
        exact, lost = factored(delta, limit)
        if lost > 1e-6 and not truncate:
            raise PatchError(
                f"expected changes of rank {limit} at most; {name} needs more (the rest is {lost:.1%} of its norm): "
                "raise max_rank, truncate, or export a checkpoint"
            )
        factors[name], error = exact, max(error, lost)
    ranks = {name: factor.rank for name, factor in factors.items()}
    conv = {isinstance(lm.model.get_submodule(name), Conv1D) for name in ranks}

    def write(aside: Path) -> None:
        write_adapter(aside, factors, base_of(lm, conv == {True}))

    return LoraReport(folder_aside(folder, write, overwrite), ranks, error)
