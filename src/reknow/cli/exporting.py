"""The command that writes an edited model for programs that do not know reknow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.options import ChatOpening, Force, check_model, refuse_beside
from reknow.cli.stacks import number_of_patches, read_existing
from reknow.cli.terminal import say, warn
from reknow.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from reknow.export.adapter import LoraReport
    from reknow.export.checkpoint import CheckpointReport
    from reknow.lm import LM

_FORMATS = ("hf", "lora")


def export(
    source: Annotated[Path, typer.Argument(help="A stack folder or a patch file.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="hf: a whole checkpoint; lora: a PEFT adapter for the base model.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The base model, for a patch file.", callback=check_model)
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option("--max-rank", min=1, help="Largest rank of an adapter. [512, the largest that vLLM serves]"),
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut higher ranks instead of refusing.")] = False,
    *,
    opening: ChatOpening,
    force: Force = False,
) -> None:
    """Write an edited model for programs that do not know reknow."""
    from reknow.export.adapter import export_lora
    from reknow.export.checkpoint import export_checkpoint
    from reknow.files.outputs import marked_files, output_folder

    if to not in _FORMATS:
        raise did_you_mean("export format", to, _FORMATS)
    if to == "hf":
        refuse_beside("--to hf", {"--max-rank": max_rank, "--truncate": truncate})
    out = output_folder(out, force, marked_files, (source, model))
    lm = _open_edited(source, model, opening)
    if to == "hf":
        written = export_checkpoint(lm, out, overwrite=force)
        patches = number_of_patches(len(lm.patches))
        say(f"wrote {out}: {lm.name} with {patches}; AutoModelForCausalLM.from_pretrained loads it")
        return _say_rounding(written)
    report = export_lora(lm, out, max_rank=max_rank, truncate=truncate, overwrite=force)
    _say_adapter(lm, report)


def _open_edited(source: Path, model: str | None, opening: ChatOpening) -> LM:
    """The model with the patches of a stack folder, or with the one of a patch file."""
    from reknow.patching.patches import Patch
    from reknow.patching.peft_folder import is_adapter

    patch = Patch.load(source) if source.is_file() or is_adapter(source) else None
    if patch is not None and model is None:
        raise InputError(f"expected --model for the patch file {source}; got none: name its base model")
    if patch is None:
        read_existing(source)
        refuse_beside("a stack, which names its base,", {"--model": model})
    lm = opening.open(str(source) if patch is None else str(model))
    if patch is not None:
        lm.apply(patch)
    return lm


def _say_rounding(written: CheckpointReport) -> None:
    """The dtype of the checkpoint, and what rounding to it did to the edits."""
    dtype = str(written.dtype).removeprefix("torch.")
    if written.held is None:
        return say(f"{dtype}, bit for bit as in memory")
    before, after = written.held
    say(
        f"{dtype}, as the base; reliability (teacher-forced, exact): {before} of {written.edits} edits in memory, "
        f"{after} as written"
    )
    if after < before:
        warn(f"rounding to {dtype} loses {before - after} of the edits: --dtype float32 keeps them all")


def _say_adapter(lm: LM, report: LoraReport) -> None:
    """What an adapter holds, what cutting it lost, and the line that serves it."""
    for name, rank in report.ranks.items():
        say(f"{name}: rank {rank}")
    say(f"wrote {report.folder}: relative error {report.error:.2g} at most; peft.PeftModel loads it on {lm.name}")
    if report.error:
        _say_reliability(lm, report.rank)
    say(f"serve it with: {report.serve_command}")


def _say_reliability(lm: LM, rank: int) -> None:
    """How many edits the applied patches make, and how many are left when they are cut to `rank`."""
    from reknow.patching.patches import merge as merged

    whole = merged(lm.patches)
    asked = list(zip(*((edit.text, edit.target_new, edit.separator) for edit in whole.edits), strict=True))
    exact = sum(score.said for score in lm.score(*asked))
    with lm.stacked([whole.truncated(rank)[0]]):
        left = sum(score.said for score in lm.score(*asked))
    say(f"reliability (teacher-forced, exact): {exact} of {len(whole.edits)} edits before truncation, {left} after")
