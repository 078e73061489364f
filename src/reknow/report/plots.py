"""Figures of a run, without pyplot: nothing global is touched, and no display is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from reknow.evaluation.metrics import PROTOCOLS
from reknow.evaluation.results import KINDS, UNEDITED_BEFORE, Results
from reknow.report.retention import by_age, so_far

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8a6fd1", "#7f7f7f")
"""Okabe & Ito's colours, which people with colour blindness tell apart; two replaced for dark backgrounds."""

INK, FAINT = "#333334", "#bbbbbc"

_PROTOCOL_NAMES = {
    "teacher_forced_exact": "teacher-forced, exact",
    "teacher_forced_tokens": "teacher-forced, tokens",
    "generated": "generated freely",
}
STYLE: Any = {
    "text.parse_math": False,  # labels are what users name things, and `$` is no formula
    "svg.fonttype": "none",
    "svg.hashsalt": "reknow",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Picture(NamedTuple):
    """A figure of a report."""

    file: str
    caption: str
    figure: Figure


def make_figures(results: Results) -> list[Picture]:
    """A panel of bars for each kind of probe and, for a sequence, what is left of its edits."""
    with matplotlib.rc_context(STYLE):
        found = [(kind, f"{kind.capitalize()}, %", _bar_figure(results, kind)) for kind in KINDS]
        if results.manifest["settings"]["mode"] == "sequential":
            for protocol in ("teacher_forced_exact", "generated"):
                name = _PROTOCOL_NAMES[protocol]
                caption = f"Reliability against the number of later edits, % ({name})"
                found.append((f"by_age_{protocol}", caption, retention_figure(results, protocol)))
                caption = f"Reliability and locality of all edits so far, % ({name})"
                found.append((f"so_far_{protocol}", caption, sequence_figure(results, protocol)))
    return [Picture(f"figure_{name}.png", caption, figure) for name, caption, figure in found if figure is not None]


def _bar_figure(results: Results, kind: str) -> Figure | None:
    """Mean and 95 % interval of one kind of probe: a group of bars per method, a bar per protocol."""
    groups = [UNEDITED_BEFORE, *((method, results.last_stage) for method in results.manifest["settings"]["methods"])]
    groups = [g for g in groups if any((*g, f"{kind}@{protocol}") in results.cells for protocol in PROTOCOLS)]
    if not groups:
        return None
    figure = Figure(figsize=(3.6, 0.4 + 0.6 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    for place, group in enumerate(groups):
        for number, protocol in enumerate(_PROTOCOL_NAMES):
            cell = results.cells.get((*group, f"{kind}@{protocol}"))
            if cell is not None:
                y, mean = place + (number - 1) * 0.27, 100 * cell.mean
                axes.barh(y, mean, height=0.23, color=PALETTE[number])
                end = mean
                if cell.low is not None and cell.high is not None:
                    low, end = 100 * cell.low, 100 * cell.high
                    axes.plot([low, end], [y, y], color=INK, linewidth=1)
                axes.text(max(mean, end) + 1.5, y, f"{mean:.0f}", va="center", fontsize=7.5)
    axes.set_yticks(range(len(groups)), [method for method, _ in groups])
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 25))
    axes.tick_params(length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.4)
    axes.set_axisbelow(True)
    return figure


def retention_figure(results: Results, protocol: str) -> Figure | None:
    """Reliability of an edit against how many were made after it; band: 95 % interval."""
    key = f"reliability@{protocol}"
    curves = {method: by_age(results, method, key) for method in results.manifest["settings"]["methods"]}
    curves = {method: points for method, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    figure, axes = _time_axes("edits made later")
    for number, (method, points) in enumerate(curves.items()):
        lags, *shares = zip(*points, strict=True)
        means, lows, highs = ([100 * share for share in column] for column in shares)
        color = PALETTE[number % len(PALETTE)]
        axes.plot(lags, means, "-o", color=color, markersize=3, label=method)
        axes.fill_between(lags, lows, highs, color=color, alpha=0.15, linewidth=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def sequence_figure(results: Results, protocol: str) -> Figure | None:
    """Mean reliability (solid) and locality (dashed) of all edits so far, at the checkpoints and the end."""
    figure, axes = _time_axes("edits made")
    for number, method in enumerate(results.manifest["settings"]["methods"]):
        for kind, line in (("reliability", "-"), ("locality", "--")):
            points = [(at, 100 * mean) for at, mean, *_ in so_far(results, method, f"{kind}@{protocol}")]
            if len(points) > 1:
                style = {"color": PALETTE[number % len(PALETTE)], "marker": "o", "markersize": 3}
                axes.plot(*zip(*points, strict=True), line, **style, label=f"{method}, {kind}")
    if not axes.lines:
        return None
    axes.legend(frameon=False, fontsize=8)
    return figure


def _time_axes(label: str):
    figure = Figure(figsize=(3.6, 2.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylim(-3, 103)
    axes.set_xlabel(label)
    axes.grid(axis="y", color=FAINT, linewidth=0.4)
    return figure, axes


def save_png(figure: Figure, path: Path) -> None:
    """The figure as a picture on white."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="png", dpi=160, facecolor="white")
