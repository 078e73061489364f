"""The command that writes an edited model for programs that do not know reknow."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reknow.cli.options import ChatOpening, Force, check_model, refuse_beside
from reknow.cli.stacks import number_of_patches
from reknow.cli.terminal import say, say_table, warn
from reknow.errors import InputError, MissingExtra, did_you_mean

if TYPE_CHECKING:
    from reknow.export.adapter import LoraReport
    from reknow.export.checkpoint import CheckpointReport
    from reknow.export.gguf_adapter import GGUFLoraReport
    from reknow.export.measure import Answer, Measured
    from reknow.lm import LM

_FORMATS = ("hf", "lora", "gguf-lora", "gguf")
_OF_ADAPTERS = ("lora", "gguf-lora")


def export(
    source: Annotated[
        Path, typer.Argument(help="A stack or a patch: a path, or hub:owner/name.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Argument(help="The folder to write; for gguf the file.", show_default=False)
    ] = None,
    *,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="hf: a whole checkpoint; lora: a PEFT adapter for the base model; gguf-lora: an adapter for "
            "llama.cpp and Ollama; gguf: the base's GGUF file with the edits in it.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="The base model, for a patch file.", callback=check_model)
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="A GGUF file of the base model, for gguf and gguf-lora.")
    ] = None,
    also_out: Annotated[Path | None, typer.Option("--out", help="The same as OUT.", show_default=False)] = None,
    max_rank: Annotated[
        int | None,
        typer.Option("--max-rank", min=1, help="Largest rank of an adapter. [512, the largest that vLLM serves]"),
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut higher ranks instead of refusing.")] = False,
    opening: ChatOpening,
    force: Force = False,
) -> None:
    """Write an edited model for programs that do not know reknow."""
    if to not in _FORMATS:
        raise did_you_mean("export format", to, _FORMATS)
    if to not in _OF_ADAPTERS:
        refuse_beside(f"--to {to}", {"--max-rank": max_rank, "--truncate": truncate})
    if not to.startswith("gguf"):
        refuse_beside(f"--to {to}", {"--base": base})
    out = _check_out(out, also_out, to, force, (source, model, base))
    if base is not None and not base.is_file():
        raise InputError(f"expected --base as a GGUF file; {base} is none: give the file")
    if to == "gguf" and base is None:
        raise InputError("expected --base FILE.gguf for --to gguf; got none: name the base model's GGUF file")
    if to.startswith("gguf") and find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf", f"--to {to}")
    from reknow.files.hub import local

    lm = _open_edited(local(source), model, opening)
    if to == "hf":
        _export_checkpoint(lm, out, force)
    elif to == "gguf":
        _export_gguf(lm, base, out, force)
    else:
        _export_adapter(lm, out, to, base, {"max_rank": max_rank, "truncate": truncate, "overwrite": force})


def _check_out(
    out: Path | None, also_out: Path | None, to: str, force: bool, sources: Sequence[str | Path | None]
) -> Path:
    """Where the export goes; raises InputError where it is named twice or not at all, or may not be written."""
    from reknow.files.outputs import marked_files, output_file, output_folder

    if (out is None) == (also_out is None):
        got = "none" if out is None else "OUT and --out"
        raise InputError(f"expected one place to write to; got {got}: name it once")
    place = out or also_out
    assert place is not None
    return output_file(place, force, sources) if to == "gguf" else output_folder(place, force, marked_files, sources)


def _export_checkpoint(lm: LM, out: Path, force: bool) -> None:
    from reknow.export.checkpoint import export_checkpoint

    written = export_checkpoint(lm, out, overwrite=force)
    patches = number_of_patches(len(lm.patches))
    say(f"wrote {out}: {lm.name} with {patches}; AutoModelForCausalLM.from_pretrained loads it")
    _say_rounding(written)
    if not all(in_memory for _, in_memory in written.measured.missed):  # else rounding took them, as it says
        _warn_of_missed(out, written.measured)


def _export_adapter(lm: LM, out: Path, to: str, base: Path | None, options: dict[str, Any]) -> None:
    report: LoraReport | GGUFLoraReport
    if to == "lora":
        from reknow.export.adapter import export_lora
        from reknow.model.sources import is_gguf

        report, loads = export_lora(lm, out, **options), f"peft.PeftModel loads it on {lm.name}"
        if is_gguf(Path(lm.name)):
            loads += " as transformers opens it (gguf_file=…); llama.cpp wants --to gguf-lora"
    else:
        from reknow.export.gguf_adapter import export_gguf_lora

        report = export_gguf_lora(lm, out, base, **options)
        loads = f"llama.cpp loads {report.adapter} on a GGUF file of {lm.name}"
    for name, rank in report.ranks.items():
        say(f"{name}: rank {rank}")
    say(f"wrote {out}: relative error {report.error:.2g} at most; {loads}")
    if report.error:
        _say_reliability(lm, report.rank)
    _warn_of_missed(out, report.measured)
    for command in report.commands:
        say(f"serve it with: {command}")


def _export_gguf(lm: LM, base: Path | None, out: Path, force: bool) -> None:
    from reknow.export.gguf_model import export_gguf

    report = export_gguf(lm, str(base), out, overwrite=force)
    for name, (was, now) in report.tensors.items():
        say(f"{name}: {was}" + ("" if now == was else f", now {now}"))
    say(f"wrote {out}: {base} with {number_of_patches(len(lm.patches))}")
    measured = report.measured
    columns = ["prompt", "new answer", " before", " in memory", " in the file", "said"]
    say_table(
        columns,
        [
            [edit.text, edit.target_new, *map(_probability, moments), "yes" if moments[-1].said else "no"]
            for edit, *moments in zip(measured.edits, measured.before, measured.after, measured.last, strict=True)
        ],
    )
    _warn_of_missed(out, measured)
    if report.not_asked is not None:
        return warn(f"the file was not asked, the last column is that of the model in memory: {report.not_asked}")
    say(f"said (teacher-forced, exact): {measured.held} of {len(measured.edits)} edits, asked of {out}")
    return say(f"serve it with: {shlex.join(['llama-server', '-m', str(out)])}")


def _warn_of_missed(out: Path, measured: Measured | None) -> None:
    """Says where what was written does not answer its own edits: a success in writing is none of the edits."""
    if measured is None or not (missed := measured.missed):
        return
    (edit, in_memory), wanted = missed[0], len(measured.edits) - sum(measured.replaced)
    more = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
    why = "is not in force in memory either: put on what it was made on, or make it again"
    warn(
        f"{out} says {wanted - len(missed)} of {wanted} edits that were asked: not “{edit.text} {edit.target_new}”"
        f"{more}, which {'was lost in writing' if in_memory else why}"
    )


def _probability(answer: Answer) -> str:
    return "no number" if answer.probability is None else f"{answer.probability:.3g}"


def _open_edited(source: Path, model: str | None, opening: ChatOpening) -> LM:
    """The model with the patches of a stack folder, or with the one of a patch file."""
    from reknow.patching.patches import Patch
    from reknow.patching.peft_folder import is_adapter
    from reknow.patching.stack import read_existing

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
    from reknow.export.measure import LOST

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
    elif written.lost > LOST:
        warn(
            f"the changes are so large that rounding to {dtype} takes {written.lost:.1%} of a matrix, and may take "
            "other facts: --dtype float32 keeps them"
        )


def _say_reliability(lm: LM, rank: int) -> None:
    """How many edits the applied patches make, and how many are left when they are cut to `rank`."""
    from reknow.export.measure import ask
    from reknow.patching.patches import merge as merged

    whole = merged(lm.patches)
    exact = sum(answer.said for answer in ask(lm, whole.edits))
    with lm.stacked([whole.truncated(rank)[0]]):
        left = sum(answer.said for answer in ask(lm, whole.edits))
    say(f"reliability (teacher-forced, exact): {exact} of {len(whole.edits)} edits before truncation, {left} after")
