"""The folders that commands write into and take up again: what shows that they are theirs, what they write there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from reknow.cli.options import DEMO
from reknow.errors import InputError
from reknow.files.outputs import MARK, growing_folder

_REPORT = ("report.html", "report.csv", "report.md", "figure*.png")
_STUDY = ("study.md", "study.png", "convergence.md", "convergence.png")
_RUN = ("before.jsonl", "cases.jsonl", "inside.jsonl", "script_ppl_r.jsonl", *_REPORT, *_STUDY)
_TRAINING = ("editor.safetensors", "checkpoint.safetensors", "log.jsonl")
_INSTRUCTIONS = ("instructions.json", "start.json", "proposals.jsonl", "scores.jsonl")
_PICTURES = tuple(f"{name}.{ending}" for name in ("trace", "average", "bars") for ending in ("png", "svg"))
TRACES = "traces.jsonl"


def run_folder(name: str, model: str) -> Path:
    """Where a run goes that names no folder: models other than the demo model have their own."""
    return Path("runs") / (name if model == DEMO else f"{name}-{Path(model.rpartition(':')[2]).name}")


def run_place(out: Path, command: str, model: str, sets: Iterable[str] = ()) -> dict[str, Path]:
    """Name of each set → its run folder: `out` itself where there is one or none."""
    names = list(sets)
    whole = growing_folder(out, command, own=("manifest.json", "*/manifest.json"), written=_RUN, sources=(model,))
    if len(names) < 2:
        return dict.fromkeys(names or [""], whole)
    return {
        name: growing_folder(whole / name, command, own=("manifest.json",), written=_RUN, sources=(model,))
        for name in names
    }


def training_place(out: Path, model: str) -> Path:
    """The folder of a training."""
    return growing_folder(out, "train", own=("manifest.json",), written=_TRAINING, sources=(model,))


def study_place(out: Path, name: str, model: str) -> Path:
    """The folder of studies, which share their editors."""
    written = tuple(f"{name}.{ending}" for ending in ("md", "csv", "json", "png"))
    return growing_folder(out, "study", own=("editors",), written=written, sources=(model,))


def instructions_place(out: Path, model: str) -> Path:
    """The folder of a search for instructions."""
    own = (MARK, "manifest.json", "trial")
    return growing_folder(out, "instruct", own=own, written=_INSTRUCTIONS, sources=(model,))


def report_place(run: Path, out: Path) -> Path:
    """Another folder for the report of a run, or for the folders of several."""
    parts = [path.parent.relative_to(run) for path in run.glob("*/manifest.json")]
    for part in parts:
        growing_folder(out / part, "report", own=(MARK, "../" + MARK, "manifest.json"), written=_REPORT)
    written = (*_REPORT, *_STUDY)
    return growing_folder(out, "report", own=(MARK, "manifest.json"), written=written)


def trace_place(out: Path, model: str, force: bool) -> Path:
    """The folder of traces; with `force` pictures from elsewhere are written over, traces from elsewhere never."""
    own, written = (MARK, TRACES), () if force else _PICTURES
    out = growing_folder(out, "trace", own=own, written=written, sources=(model,))
    try:
        with open(out / TRACES, "rb") as file:
            ours = file.readline(10_000).startswith(b'{"model": ')
    except FileNotFoundError:
        ours = True
    except OSError as error:
        raise InputError(f"expected a folder for traces; {out / TRACES} cannot be read ({error.strerror})") from error
    if not ours:
        raise InputError(
            f"expected traces that reknow made; {out / TRACES} holds something else: choose another --out"
        )
    return out
