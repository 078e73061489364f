"""`reknow report`: a run as a page, or several on one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from reknow.cli.places import comparison_place, report_place
from reknow.cli.terminal import say
from reknow.progress import progress

_COMPARISON = Path("runs/comparison")
"""Where several runs are compared, unless --out says so."""


def report(
    run: Annotated[
        list[Path],
        typer.Argument(help="The folder of a run, finished or not; several are compared.", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Another folder for the report.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set lines that are no rows aside first; the run makes them again.")
    ] = False,
) -> None:
    """Write a run as HTML, Markdown, CSV, LaTeX and pictures; or a study, finished or not. Several are compared."""
    if len(run) > 1:
        return compare_runs(run, out, repaired=repair)
    write_run(run[0], out, repaired=repair)


def compare_runs(runs: Sequence[Path], out: Path | None, *, repaired: bool = False) -> None:
    """Several runs on one page, over the cases that all have."""
    from reknow.evaluation import Results
    from reknow.files.outputs import mark_folder
    from reknow.report import write_comparison
    from reknow.report.run_list import name_runs

    named = name_runs(runs)
    folders = list(named.values())
    out = comparison_place(out or _COMPARISON, folders)
    if repaired:
        _repair(folders)
    loaded = {name: Results.load(folder) for name, folder in named.items()}
    page = write_comparison(loaded, out)
    mark_folder(out, "report")
    say(f"comparison: {page} (also comparison.md)")


def _repair(folders: Sequence[Path]) -> None:
    """Sets lines that are no rows aside, and says which."""
    from reknow.evaluation.run_parts import repair

    for said in (line for folder in folders for line in repair(folder)):
        say(said)


def write_run(run: Path, out: Path | None = None, *, repaired: bool = False) -> None:
    """The report of a run, or of a study."""
    from reknow.evaluation import Results
    from reknow.files.outputs import MANIFEST_FILE, mark_folder
    from reknow.report import write_report
    from reknow.report.run_list import parts_of
    from reknow.studies.comparison_page import split_by_set, write_study
    from reknow.studies.growth_page import write_growth
    from reknow.studies.ice.convergence import ROWS_FILE
    from reknow.studies.ice.convergence_page import write_convergence
    from reknow.studies.ice.script_ppl_r import with_script_ppl_r

    out = None if out is None else report_place(run, out)
    inside = (run / ROWS_FILE).exists()
    if out is not None and (inside or any(run.glob(f"**/{MANIFEST_FILE}"))):
        mark_folder(out, "report")
    if inside:
        return say(f"report: {write_convergence(run, out)}")
    parts = parts_of(run)
    if repaired:
        _repair(parts)
    for part in progress.each("writing the report", parts):
        page = write_report(part, out and out / part.relative_to(run))
        say(f"report: {page} (also report.md, report.csv, report.tex and figures)")
    runs = {part.name: with_script_ppl_r(Results.load(part), part) for part in parts}
    if len(split_by_set(runs)) > 1:
        say(f"study: {write_study(run.name, runs, out or run)}")
    elif len(runs) > 1:
        say(f"study: {write_growth(run.name, runs, out or run)}")
