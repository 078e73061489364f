"""A study whose runs differ in how many edits hold at once, on one page: a line for each number, and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reknow.evaluation.results import UNEDITED_BEFORE, Cell, Results
from reknow.evaluation.stages import AFTER_EDIT, END, IN_CONTEXT, checkpoint_edits
from reknow.files.atomic import atomic_write, write_text
from reknow.report.plots import FAINT, PALETTE, STYLE, save_png
from reknow.texts.tables import to_markdown

_COLUMNS = {
    "reliability": "reliability@teacher_forced_exact",
    "generalization": "generalization@teacher_forced_exact",
    "locality": "locality@teacher_forced_exact",
    "perplexity": "perplexity@side",
    "seconds": "seconds@edit",
}
_DRAWN = ("reliability", "generalization", "locality", "perplexity")
ONE, BATCH, SEQUENCE = "each by itself", "one patch", "ten at a time"
_NOTE = (
    "Reliability, generalization, locality: teacher-forced, every token of the answer right, %; locality: as before "
    "all edits. Perplexity: of a few paragraphs of WikiText. Seconds: per edit, on a machine as loaded as it was. "
    "Means over cases [95 % bootstrap interval]."
)


def write_growth(title: str, runs: Mapping[str, Results], folder: str | Path) -> Path:
    """Writes `growth.md` and `growth.png` into the study's folder, finished or not.

    Returns:
        The path of the page.
    """
    folder = Path(folder)
    points = growth_points(runs)
    parts = [f"# {title}", to_markdown(_lines(points)), _NOTE, "![By number of edits](growth.png)"]
    atomic_write(folder / "growth.png", lambda path: save_png(_figure(points), Path(path)))
    return write_text(folder / "growth.md", "\n\n".join(parts) + "\n")


def growth_points(runs: Mapping[str, Results]) -> dict[tuple[str, str, int], dict[str, Cell]]:
    """(method, how they were made, edits that hold) → column → number; the unedited model's first, with 0 edits."""
    found: dict[tuple[str, str, int], dict[str, Cell]] = {}
    for results in runs.values():
        mode = results.manifest["settings"]["mode"]
        for method, stage in results.case_values:
            if (method, stage) == UNEDITED_BEFORE:
                place = (method, "–", 0)
            elif stage == IN_CONTEXT:
                continue
            elif mode == "single":
                place = (method, ONE, 1)
            elif stage == AFTER_EDIT:  # of a turn only, while the others are not read
                continue
            else:
                edits = len(results.before) if stage == END else checkpoint_edits(stage)
                place = (method, BATCH if mode == "batch" else SEQUENCE, edits or 0)
            cells = {name: results.cells.get((method, stage, key)) for name, key in _COLUMNS.items()}
            found[place] = {name: cell for name, cell in cells.items() if cell is not None}
    order = list(dict.fromkeys(method for method, *_ in found))
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1], item[0][2])))


def _lines(points: Mapping[tuple[str, str, int], Mapping[str, Cell]]) -> list[list[str]]:
    """Header and a line per point."""
    names = [name for name in _COLUMNS if any(name in cells for cells in points.values())]
    lines = [["method", "made", "edits", "read", *names]]
    for (method, how, edits), cells in points.items():
        read = max((cell.cases for cell in cells.values()), default=0)
        texts = [_shown(cells.get(name), plain=name in ("perplexity", "seconds")) for name in names]
        lines.append([method, how, str(edits) if edits else "–", str(read), *texts])
    return lines


def _shown(cell: Cell | None, *, plain: bool) -> str:
    if cell is None:
        return "–"
    return cell.number() if plain else f"{cell.number()} {cell.interval()}".strip()


def _scale(axes: Axes, name: str, numbers: list[int]) -> None:
    """The axes of a panel; ticks are plain numbers."""
    axes.set_xscale("log")
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    if name == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.4g}")
        axes.yaxis.set_minor_formatter("{x:.4g}")
    else:
        axes.set_ylim(-4, 104)
    axes.xaxis.minorticks_off()
    axes.set_title(name if name == "perplexity" else f"{name}, %")


def _figure(points: Mapping[tuple[str, str, int], Mapping[str, Cell]]) -> Figure:
    """A row of panels for edits in one patch, one for those made ten at a time: each number by how many edits hold.

    A method is in the rows of what it was run in, with its single edits in front; a dotted line is the unedited
    model."""
    hows = [how for how in (BATCH, SEQUENCE) if any(place[1] == how for place in points)] or [ONE]
    methods = list(dict.fromkeys(method for method, how, _ in points if how != "–"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.5 * len(hows) + 0.5), layout="constrained")
        grid = figure.subplots(len(hows), len(_DRAWN), squeeze=False)
        for how, panels in zip(hows, grid, strict=True):
            row = {
                place: cells
                for place, cells in points.items()
                if place[1] == how or (place[1] == ONE and any(each[:2] == (place[0], how) for each in points))
            }
            for name, axes in zip(_DRAWN, panels, strict=True):
                for number, method in enumerate(methods):
                    _draw_line(axes, name, method, row, PALETTE[number % len(PALETTE)], max(6 - 1.5 * number, 2))
                for (_, how_made, _), cells in points.items():
                    if how_made == "–" and name == "perplexity" and name in cells:
                        axes.axhline(cells[name].mean, color=FAINT, linestyle=":")
                _scale(axes, name, sorted({edits for *_, edits in row}))
                axes.set_xlabel(f"edits, {how}")
                axes.title.set_fontsize(9)
                axes.grid(color=FAINT, linewidth=0.4)
        shown = {
            line.get_label(): line for axes in grid.flat for line in axes.get_lines() if line.get_label() in methods
        }
        if shown:
            figure.legend(
                shown.values(), shown.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=8
            )
    return figure


def _draw_line(
    axes: Axes, name: str, method: str, row: Mapping[tuple[str, str, int], Mapping[str, Cell]], color, size
):
    """A method's line in a panel."""
    scale = 1 if name == "perplexity" else 100
    line = sorted(
        (edits, cells[name].mean * scale) for (of, _, edits), cells in row.items() if of == method and name in cells
    )
    if line:
        axes.plot(*zip(*line, strict=True), "o-", color=color, markersize=size, label=method)
