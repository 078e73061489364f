"""Figures of causal traces, in the paper's forms: heat maps of one prompt, heat maps and bars of averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea
from torch import Tensor

from reknow.files.atomic import atomic_write
from reknow.report.heat_map import scale_of, stride, title_of
from reknow.report.trace_words import Label, label_tokens, shown
from reknow.tracing.causal import TOKEN_CLASSES, AverageEffects, Trace
from reknow.tracing.restoration import RestorationKind

_COLORS: dict[RestorationKind, tuple[str, str]] = {
    "hidden": ("Purples", "#7261ab"),
    "mlp": ("Greens", "#2a9d3a"),
    "attention": ("Reds", "#d9382e"),
    "mlp_severed": ("Greens", "#2a9d3a"),
    "attention_severed": ("Reds", "#d9382e"),
}
"""Colour map and bar colour of each kind; the paper's purple, green and red."""

_GREY = "#9a9a9e"
"""Of what stands around a token in its word."""

_STYLE: Any = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "reknow",
    "savefig.dpi": 130,
    "text.parse_math": False,
}


def trace_figure(trace: Trace, kinds: Sequence[RestorationKind] | None = None) -> Figure:
    """P(answer) after restoring each token (rows; the subject's in bold) in each layer (columns), per kind, on one
    scale; a token is shown in its word."""
    kinds = list(trace.restored) if kinds is None else list(kinds)
    labels, (low, high, _) = label_tokens(trace), scale_of(trace)
    with matplotlib.rc_context(_STYLE):
        figure, panels = _panels(len(kinds), len(labels), trace.restored[kinds[0]].shape[1])
        for axes, kind in zip(panels, kinds, strict=True):
            mesh = _heat_map(axes, trace.restored[kind], kind, "Blues", low, high, trace.window)
        bar = figure.colorbar(mesh, ax=panels, fraction=0.06 / len(kinds), pad=0.02)
        bar.ax.set_title(f"P({shown(trace.answer)})", fontsize=8)
        panels[0].set_yticks([])
        for row, label in enumerate(labels):
            _write_label(panels[0], row, label)
        ends = f"P({shown(trace.answer)}): clean {trace.clean:.2f}, corrupted {trace.corrupted:.2f}"
        figure.suptitle(f"{trace.prompt}   [{ends}]", fontsize=9)
    return figure


def average_figure(average: AverageEffects, kinds: Sequence[RestorationKind] | None = None) -> Figure:
    """Average indirect effects: token classes by layers, one heat map per kind on one scale."""
    kinds = list(average.effects) if kinds is None else list(kinds)
    points = {kind: 100 * average.effects[kind] for kind in kinds}
    top = max(1e-6, *map(_largest, points.values()))
    with matplotlib.rc_context(_STYLE):
        figure, panels = _panels(len(kinds), len(TOKEN_CLASSES), average.effects[kinds[0]].shape[1])
        for axes, kind in zip(panels, kinds, strict=True):
            mesh = _heat_map(axes, points[kind], kind, _COLORS[kind][0], 0.0, top, average.window)
            _write_values(axes, points[kind], top)
            bar = figure.colorbar(mesh, ax=axes, fraction=0.06, pad=0.03)
            bar.ax.set_title("AIE", fontsize=8)
        panels[0].set_yticks(range(len(TOKEN_CLASSES)), TOKEN_CLASSES)
        figure.suptitle(f"Average indirect effect over {average.facts} facts, points of probability", fontsize=10)
    return figure


def effect_bars(
    average: AverageEffects, kinds: Sequence[RestorationKind] | None = None, token_class: str = "Last subject token"
) -> Figure:
    """Average indirect effect at one token class by layer: a bar per kind, with its 95 % interval."""
    kinds = list(average.effects) if kinds is None else list(kinds)
    row = TOKEN_CLASSES.index(token_class)
    layers = average.effects[kinds[0]].shape[1]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(4.5, 1.5 + 0.35 * layers), 2.6), layout="constrained")
        axes = figure.add_subplot()
        width = 0.8 / len(kinds)
        for number, kind in enumerate(kinds):
            places = [layer + (number - (len(kinds) - 1) / 2) * width for layer in range(layers)]
            axes.bar(
                places,
                (100 * average.effects[kind][row]).tolist(),
                width,
                yerr=(100 * average.errors[kind][row]).nan_to_num(0.0).tolist(),
                color=_COLORS[kind][1],
                hatch="////" if "severed" in kind else None,
                edgecolor="white",
                linewidth=0.0,
                error_kw={"elinewidth": 0.8, "ecolor": "#333334"},
                label=title_of(kind, average.window),
            )
        axes.axhline(0, color="#333334", linewidth=0.6)
        axes.set_xlabel("layer")
        axes.set_ylabel("indirect effect, points")
        axes.set_xticks(range(0, layers, stride(layers)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        axes.set_title(f"{token_class}: average over {average.facts} facts, 95 % interval", fontsize=9)
    return figure


def save_figure(figure: Figure, path: str | Path) -> list[Path]:
    """Writes the figure as `PATH.png` and `PATH.svg`; the folder is made."""
    path = Path(path)
    endings: dict[str, dict[str, Any]] = {"png": {"facecolor": "white"}, "svg": {"metadata": {"Date": None}}}
    with matplotlib.rc_context(_STYLE):
        return [
            atomic_write(
                path.with_name(f"{path.name}.{ending}"),
                lambda path, options=options: figure.savefig(path, **options),
            )
            for ending, options in endings.items()
        ]


def _panels(count: int, rows: int, layers: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side that share their rows."""
    width, height = max(1.9, 0.8 + 0.11 * layers), 1.3 + 0.19 * rows
    figure = Figure(figsize=(1.2 + count * (width + 0.5), height), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _write_values(axes: Axes, table: Tensor, high: float) -> None:
    """Writes the cells of a small table into it: colours hide weak rows where there is a strong one."""
    if table.shape[1] > 12:
        return
    for row, values in enumerate(table.tolist()):
        for layer, value in enumerate(values):
            if not math.isnan(value):
                color = "white" if value > 0.55 * high else "#333334"
                axes.text(layer, row, f"{round(value)}", ha="center", va="center", fontsize=7, color=color)


def _heat_map(axes: Axes, table: Tensor, kind: RestorationKind, colours: str, low: float, high: float, window: int):
    mesh = axes.imshow(table.numpy(), cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    layers = table.shape[1]
    axes.set_xticks(range(0, layers, stride(layers)))
    axes.set_xlabel("layer", fontsize=8)
    axes.set_title(title_of(kind, window), fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return mesh


def _write_label(axes: Axes, row: int, label: Label) -> None:
    """Writes a token beside its row, the rest of its word in grey, the subject's in bold."""
    weight = "bold" if label.in_subject else "normal"
    parts = [(label.before, _GREY), (label.token, "black"), (label.after, _GREY)]
    texts: list[Artist] = [
        TextArea(text, textprops={"color": colour, "weight": weight}) for text, colour in parts if text
    ]
    place, beside = ("axes fraction", "data"), "offset points"
    axes.add_artist(
        AnnotationBbox(
            HPacker(children=texts, pad=0, sep=0),
            (0, row),
            (-4, 0),
            place,
            beside,
            frameon=False,
            box_alignment=(1, 0.5),
        )
    )


def _largest(table: Tensor) -> float:
    return float(table.nan_to_num(-math.inf).max())
