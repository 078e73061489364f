"""The folders that commands write into and take up again: what shows that they are theirs, what they write there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reknow.cli.options import DEMO
from reknow.errors import InputError
from reknow.files.outputs import MANIFEST_FILE, MARK, growing_folder

TRACES, INSTRUCTIONS, START = "traces.jsonl", "instructions.json", "start.json"
_REPORT = ("report.html", "report.csv", "report.md", "report.tex", "figure*.png")
_STUDY = ("study.md", "study.png", "growth.md", "growth.png", "convergence.md", "convergence.png")
_PICTURES = tuple(f"{name}.{ending}" for name in ("trace", "average", "bars") for ending in ("png", "svg"))
_TRACES_START = b'{"model": '


def run_folder(name: str, model: str) -> Path:
    """Where a run goes that names no folder: models other than the demo model have their own."""
    return Path("runs") / (name if model == DEMO else f"{name}-{Path(model.rpartition(':')[2]).name}")


def run_place(out: Path, command: str, model: str, sets: Iterable[str] = ()) -> dict[str, Path]:
    """Name of each set → its run folder: `out` itself where there is one or none."""
    from reknow.engine.shards import PART
    from reknow.evaluation.run_folder import BEFORE_FILE, ROWS_FILE
    from reknow.studies.ice.convergence import ROWS_FILE as CONVERGENCE_FILE
    from reknow.studies.ice.script_ppl_r import FILE as SCRIPT_FILE

    names, parts = list(sets), tuple(f"{Path(file).stem}{PART[1:]}" for file in (BEFORE_FILE, ROWS_FILE))
    written = (BEFORE_FILE, ROWS_FILE, *parts, CONVERGENCE_FILE, SCRIPT_FILE, *_REPORT, *_STUDY)

    def place(folder: Path, *own: str) -> Path:
        return growing_folder(folder, command, own=own, written=written, sources=(model,))

    whole = place(out, MANIFEST_FILE, f"*/{MANIFEST_FILE}")
    if len(names) < 2:
        return dict.fromkeys(names or [""], whole)
    return {name: place(whole / name, MANIFEST_FILE) for name in names}


def training_place(out: Path, model: str) -> Path:
    """The folder of a training."""
    from reknow.learning.editors import EDITOR_FILE
    from reknow.learning.loop import CHECKPOINT_FILE, LOG_FILE

    written = (EDITOR_FILE, CHECKPOINT_FILE, LOG_FILE)
    return growing_folder(out, "train", own=(MANIFEST_FILE,), written=written, sources=(model,))


def study_place(out: Path, name: str, model: str) -> Path:
    """The folder of studies, which share their editors."""
    written = tuple(f"{name}.{ending}" for ending in ("md", "csv", "json", "png"))
    return growing_folder(out, "study", own=("editors",), written=written, sources=(model,))


def instructions_place(out: Path, model: str) -> Path:
    """The folder of a search for instructions."""
    from reknow.instructions.search import PROPOSALS_FILE, SCORES_FILE

    own, written = (MARK, MANIFEST_FILE, "trial"), (INSTRUCTIONS, START, PROPOSALS_FILE, SCORES_FILE)
    return growing_folder(out, "instruct", own=own, written=written, sources=(model,))


def report_place(run: Path, out: Path) -> Path:
    """Another folder for the report of a run, or for the folders of several."""
    parts = [path.parent.relative_to(run) for path in run.glob(f"*/{MANIFEST_FILE}")]
    for part in parts:
        growing_folder(out / part, "report", own=(MARK, f"../{MARK}", MANIFEST_FILE), written=_REPORT)
    written = (*_REPORT, *_STUDY)
    return growing_folder(out, "report", own=(MARK, MANIFEST_FILE), written=written)


def comparison_place(out: Path, runs: Iterable[Path]) -> Path:
    """The folder of a comparison of runs."""
    return growing_folder(out, "report", own=(MARK,), written=("comparison.html", "comparison.md"), sources=runs)


def trace_place(out: Path, model: str, force: bool) -> Path:
    """The folder of traces; with `force` pictures from elsewhere are written over, traces from elsewhere never."""
    own, written = (MARK, TRACES, f"{Path(TRACES).stem}.*-of-*.jsonl"), () if force else _PICTURES
    out = growing_folder(out, "trace", own=own, written=written, sources=(model,))
    try:
        ours = not (out / TRACES).exists() or holds_traces(out / TRACES)
    except OSError as error:
        raise InputError(f"expected a folder for traces; {out / TRACES} cannot be read ({error.strerror})") from error
    if not ours:
        raise InputError(
            f"expected traces that reknow made; {out / TRACES} holds something else: choose another --out"
        )
    return out


def trace_header(model: str, facts: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the first line of a file of traces says: what they are of."""
    return {"model": model, "facts": facts, "settings": json.loads(json.dumps(settings))}


def holds_traces(path: Path) -> bool:
    """Whether the file begins with a `trace_header`."""
    with open(path, "rb") as file:
        return file.read(len(_TRACES_START)) == _TRACES_START
