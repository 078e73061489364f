"""An edited model in one of the formats that other programs read, and what is to be said of what was written."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from reknow.export.adapter import export_lora
from reknow.export.checkpoint import CheckpointReport, export_checkpoint
from reknow.export.formats import check_format
from reknow.export.measure import LOST, Measured, ask
from reknow.lm import LM
from reknow.model.sources import is_gguf
from reknow.patching.patches import merge
from reknow.texts.writing import counted


@dataclass(frozen=True)
class Written:
    """What was written, in words."""

    format: str
    out: Path
    lines: list[str]
    """What it is, and what it lost."""
    measured: Measured
    """How the first edits are answered, by what was written where that differs from the model in memory."""
    commands: list[str]
    """The lines that serve it."""
    warnings: list[str] = field(default_factory=list)
    asked: bool = True
    """Whether the answers are those of what was written, or of the same numbers in memory."""

    @property
    def said(self) -> str:
        """How many of its edits it says."""
        return f"said (teacher-forced, exact): {self.measured.held} of {len(self.measured.edits)} edits"


def write_export(
    lm: LM,
    format: str,
    out: Path,
    *,
    base: Path | None = None,
    max_rank: int | None = None,
    truncate: bool = False,
    overwrite: bool = False,
) -> Written:
    """Writes the model with its patches in this format.

    Args:
        base: a GGUF file of the base model; needed for `gguf`.
        max_rank: largest rank of an adapter; None: 512.
        truncate: cut higher ranks of an adapter.

    Raises:
        PatchError: the patches cannot be written so; see the function of each format.
        InputError: there is no such format, `out` exists and `overwrite` is off, or it cannot be written.
    """
    check_format(format, base)
    if format == "hf":
        return _write_checkpoint(lm, out, overwrite)
    if format == "gguf":
        return _write_gguf(lm, base, out, overwrite)
    options = {"max_rank": max_rank, "truncate": truncate, "overwrite": overwrite}
    return _write_lora(lm, out, options) if format == "lora" else _write_gguf_lora(lm, out, base, options)


def _write_checkpoint(lm: LM, out: Path, overwrite: bool) -> Written:
    report = export_checkpoint(lm, out, overwrite=overwrite)
    patches = counted(len(lm.patches), "patch", "patches")
    lines = [f"wrote {out}: {lm.name} with {patches}; AutoModelForCausalLM.from_pretrained loads it"]
    told, warnings = describe_rounding(report)
    if not all(in_memory for _, in_memory in report.measured.missed):  # else rounding took them, as it says
        warnings += _missed(out, report.measured)
    return Written("hf", out, [*lines, told], report.measured, [shlex.join(["vllm", "serve", str(out)])], warnings)


def describe_rounding(report: CheckpointReport) -> tuple[str, list[str]]:
    """The dtype of the checkpoint with what rounding to it did to the edits, and what is to be warned of."""
    dtype = str(report.dtype).removeprefix("torch.")
    if report.held is None:
        return f"{dtype}, bit for bit as in memory", []
    before, after = report.held
    warnings = []
    if after < before:
        warnings.append(f"rounding to {dtype} loses {before - after} of the edits: --dtype float32 keeps them all")
    elif report.lost > LOST:
        warnings.append(
            f"the changes are so large that rounding to {dtype} takes {report.lost:.1%} of a matrix, and may take "
            "other facts: --dtype float32 keeps them"
        )
    told = f"reliability (teacher-forced, exact): {before} of {report.edits} edits in memory, {after} as written"
    return f"{dtype}, as the base; {told}", warnings


def _write_lora(lm: LM, out: Path, options: dict) -> Written:
    report, loads = export_lora(lm, out, **options), f"peft.PeftModel loads it on {lm.name}"
    if is_gguf(Path(lm.name)):
        loads += " as transformers opens it (gguf_file=…); llama.cpp wants --to gguf-lora"
    assert report.measured is not None
    return _adapter(lm, "lora", report, report.measured, loads)


def _write_gguf_lora(lm: LM, out: Path, base: Path | None, options: dict) -> Written:
    from reknow.export.gguf_adapter import export_gguf_lora  # what it needs may not be installed

    report = export_gguf_lora(lm, out, base, **options)
    loads = f"llama.cpp loads {report.adapter} on a GGUF file of {lm.name}"
    return _adapter(lm, "gguf-lora", report, report.measured, loads)


def _adapter(lm: LM, format: str, report, measured: Measured, loads: str) -> Written:
    """What is to be said of a `LoraReport` or a `GGUFLoraReport`."""
    lines = [f"{name}: rank {rank}" for name, rank in report.ranks.items()]
    lines.append(f"wrote {report.folder}: relative error {report.error:.2g} at most; {loads}")
    if report.error:
        lines.append(_describe_truncation(lm, report.rank))
    return Written(format, report.folder, lines, measured, report.commands, _missed(report.folder, measured))


def _describe_truncation(lm: LM, rank: int) -> str:
    """How many edits the applied patches make, and how many are left when they are cut to `rank`."""
    whole = merge(lm.patches)
    exact = sum(answer.said for answer in ask(lm, whole.edits))
    with lm.stacked([whole.truncated(rank)[0]]):
        left = sum(answer.said for answer in ask(lm, whole.edits))
    return f"reliability (teacher-forced, exact): {exact} of {len(whole.edits)} edits before truncation, {left} after"


def _write_gguf(lm: LM, base: Path | None, out: Path, overwrite: bool) -> Written:
    from reknow.export.gguf_model import export_gguf  # what it needs may not be installed

    report = export_gguf(lm, str(base), out, overwrite=overwrite)
    lines = [f"{name}: {was}" + ("" if now == was else f", now {now}") for name, (was, now) in report.tensors.items()]
    lines.append(f"wrote {out}: {base} with {counted(len(lm.patches), 'patch', 'patches')}")
    warnings = _missed(out, report.measured)
    if report.not_asked is not None:
        warnings.append(f"the file was not asked, the last column is that of the model in memory: {report.not_asked}")
    commands = [shlex.join(["llama-server", "-m", str(out)])]
    return Written("gguf", out, lines, report.measured, commands, warnings, asked=report.not_asked is None)


def _missed(out: Path, measured: Measured) -> list[str]:
    """Says where what was written does not answer its own edits: a success in writing is none of the edits."""
    if not (missed := measured.missed):
        return []
    (edit, in_memory), wanted = missed[0], len(measured.edits) - sum(measured.replaced)
    more = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
    why = "is not in force in memory either: put on what it was made on, or make it again"
    return [
        f"{out} says {wanted - len(missed)} of {wanted} edits that were asked: not “{edit.text} {edit.target_new}”"
        f"{more}, which {'was lost in writing' if in_memory else why}"
    ]
