"""The applied patches as one PEFT LoRA adapter, of one rank and one alpha, which every engine reads alike."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from reknow.errors import InputError, PatchError
from reknow.export.about import CARD, check_place, describe_export, hub_name, write_record
from reknow.export.card import write_card
from reknow.export.measure import Measured, ask, measure
from reknow.export.plain import find_adapters
from reknow.files.atomic import atomic_write_folder
from reknow.lm import LM
from reknow.model.exclusive import typed_exclusively
from reknow.model.parts import groups
from reknow.model.sources import is_gguf
from reknow.patching.deltas import LowRank, factorize
from reknow.patching.patches import merge
from reknow.patching.peft_folder import describe_base, write_adapter
from reknow.patching.record import check_weights
from reknow.progress import progress

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`; an adapter may have any rank up to it."""
MAX_RANK = SERVED_RANKS[-1]


@dataclass(frozen=True)
class LoraReport:
    """What an adapter holds and what it lost."""

    folder: Path
    ranks: dict[str, int]
    """Rank by matrix name, before all were padded with zeros to the largest."""
    error: float
    """Relative Frobenius error of the worst matrix; 0 unless it was truncated."""
    base: str = ""
    """What the adapter names as its base model: a folder, or a repository of the hub."""
    measured: Measured | None = None
    """How its edits are answered."""

    @property
    def rank(self) -> int:
        """The one rank of the adapter, which is its alpha too."""
        return max(self.ranks.values())

    @property
    def served_rank(self) -> int:
        """The least `--max-lora-rank` of vLLM that holds the adapter."""
        return next(rank for rank in SERVED_RANKS if rank >= self.rank)

    @property
    def commands(self) -> list[str]:
        """The lines that serve base and adapter: with vLLM, which reads no adapter on a GGUF file."""
        if is_gguf(Path(self.base)):
            return []
        line = ["vllm", "serve", self.base, "--enable-lora", "--max-lora-rank", str(self.served_rank)]
        return [shlex.join([*line, "--lora-modules", f"{self.folder.name}={self.folder}"])]


def check_exportable(lm: LM) -> None:
    """Raises PatchError where no patch is applied, one is a memory, or the model has adapters of its own."""
    if not lm.patches:
        raise PatchError("expected at least one applied patch to export; got none: apply a patch first")
    if names := find_adapters(lm.model):
        raise PatchError(
            f"expected a base without adapters to export one for it; {lm.name} has some, the first at "
            f"{names[0]}, which the new adapter would lack: export a checkpoint (`--to hf`), which "
            "holds both"
        )
    check_weights(lm.patches, "export")
    for name in (name for patch in lm.patches for name in patch.deltas):
        if groups(lm.model.get_submodule(name)) > 1:
            raise PatchError(
                f"expected changes of matrices that stand by themselves; {name} is all experts of a layer in one, "
                "which no adapter names: export a checkpoint (`--to hf`)"
            )


def factorize_patches(lm: LM, max_rank: int | None, truncate: bool) -> tuple[dict[str, LowRank], float]:
    """The sum of the applied patches as factors by matrix name, and the relative Frobenius error of the worst.

    Raises:
        PatchError: no patch is applied, one is a memory, the model has adapters of its own, or a change has a higher
            rank than `max_rank` and `truncate` is off.
        InputError: `max_rank` is below 1, or above what any engine serves.
    """
    check_exportable(lm)
    limit = MAX_RANK if max_rank is None else max_rank
    if limit < 1:
        raise InputError(f"expected a max_rank of at least 1; got {limit}: raise it")
    if limit > MAX_RANK:
        raise InputError(
            f"expected a max_rank of {MAX_RANK} at most, the largest that vLLM serves; got {limit}: cut the changes "
            "to it with `--truncate`, or export a checkpoint with `--to hf`"
        )
    factors, error = dict[str, LowRank](), 0.0
    for name, delta in progress.each("factorizing", merge(lm.patches).deltas.items(), unit="matrices"):
        exact, lost = factorize(delta, limit)
        if lost > 1e-6 and not truncate:
            more = "" if limit == MAX_RANK else "raise max_rank, "
            raise PatchError(
                f"expected changes of rank {limit} at most; {name} needs more (the rest is {lost:.1%} of its norm): "
                f"{more}cut it to that with `--truncate`, or export a checkpoint with `--to hf`"
            )
        factors[name], error = exact, max(error, lost)
    return factors, error


def ask_truncated(lm: LM, measured: Measured, rank: int) -> Measured:
    """With the answers of factors that were cut to a rank, which say less than the patches."""
    with lm.stacked([merge(lm.patches).truncated(rank)[0]]):
        return measured.as_written(ask(lm, measured.edits))


@typed_exclusively
def export_lora(
    lm: LM, folder: str | Path, *, max_rank: int | None = None, truncate: bool = False, overwrite: bool = False
) -> LoraReport:
    """Writes the applied patches as one PEFT LoRA adapter for the base model.

    All factors have one rank, padded with zeros, and alpha equals it, so that `peft`, vLLM, SGLang and llama.cpp's
    converter, of which some know one rank or one alpha only, scale every product by 1.

    Args:
        max_rank: largest rank allowed; None: 512, the largest that vLLM serves.
        truncate: cut a higher rank by SVD instead of refusing it; the report says what that loses.

    Raises:
        PatchError: no patch is applied, one is a memory, the model has adapters of its own, or a change has a higher
            rank than `max_rank`.
        InputError: `max_rank` is below 1 or above 512, the folder exists and `overwrite` is off, or the disk is full
            (an old folder stays).
    """
    folder = check_place(lm, folder, overwrite)
    factors, error = factorize_patches(lm, max_rank, truncate)
    base = describe_base(lm, factors)
    ranks = {name: factor.rank for name, factor in factors.items()}
    measured = ask_truncated(lm, measure(lm), max(ranks.values())) if error else measure(lm)
    report = LoraReport(folder, ranks, error, base["base_model_name_or_path"], measured)

    def write(new: Path) -> None:
        write_adapter(new, factors, base)
        shown = replace(report, folder=Path(folder.name), base=hub_name(lm) or "BASE")
        usage = shown.commands if report.commands else []
        (new / CARD).write_text(write_card(lm, "lora", measured, usage), encoding="utf-8")
        write_record(new, describe_export(lm, "lora", measured))

    atomic_write_folder(folder, write, overwrite)
    return report
