"""The command that writes an edited model for programs that do not know reknow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.options import ChatOpening, Force, check_model, refuse_beside
from reknow.cli.terminal import say, say_table, warn
from reknow.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from reknow.export.measure import Answer
    from reknow.export.written import Written
    from reknow.lm import LM

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
    from reknow.export.formats import FORMATS, check_format
    from reknow.files.hub import local

    if to not in FORMATS:
        raise did_you_mean("export format", to, FORMATS)
    if to not in _OF_ADAPTERS:
        refuse_beside(f"--to {to}", {"--max-rank": max_rank, "--truncate": truncate})
    if not to.startswith("gguf"):
        refuse_beside(f"--to {to}", {"--base": base})
    out = _check_out(out, also_out, to, force, (source, model, base))
    check_format(to, base)
    from reknow.export.written import write_export

    lm = _open_edited(local(source), model, opening)
    _say(write_export(lm, to, out, base=base, max_rank=max_rank, truncate=truncate, overwrite=force))


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


def _say(written: Written) -> None:
    say(*written.lines)
    if written.format == "gguf":
        measured = written.measured
        columns = ["prompt", "new answer", " before", " in memory", " in the file", "said"]
        say_table(
            columns,
            [
                [edit.text, edit.target_new, *map(_probability, moments), "yes" if moments[-1].said else "no"]
                for edit, *moments in zip(measured.edits, measured.before, measured.after, measured.last, strict=True)
            ],
        )
    for warning in written.warnings:
        warn(warning)
    if written.format == "gguf" and written.asked:
        say(f"{written.said}, asked of {written.out}")
    if written.asked:
        say(*(f"serve it with: {command}" for command in written.commands))


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
