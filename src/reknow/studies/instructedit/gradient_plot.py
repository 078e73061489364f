"""Edit gradients as points in the plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_MARKERS = ("o", "s", "^", "x")


class Panel(NamedTuple):
    """The same points by two maps, in a row of the figure."""

    title: str
    labels: Sequence[str]
    """Of the points."""
    maps: dict[str, np.ndarray]
    """Name of the map → (points, 2)."""


def gradient_figure(panels: Sequence[Panel]) -> Figure:
    """A row for each panel, a column for each map; colour and marker by label, with a legend beside each row."""
    with matplotlib.rc_context({"text.parse_math": False}):  # labels are what users name their tasks
        columns = max(len(panel.maps) for panel in panels)
        figure = Figure(figsize=(4.2 * columns + 1.6, 3.3 * len(panels)), layout="constrained")
        grid = figure.subplots(len(panels), columns, squeeze=False)
        letters = iter("abcdefghijklmnopqrstuvwxyz")
        for row, panel in zip(grid, panels, strict=True):
            for axes, (name, points) in zip(row, panel.maps.items(), strict=True):
                _scatter(axes, points, panel.labels)
                axes.set_title(f"({next(letters)}) {panel.title}, {name}", fontsize=9)
            row[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
        return figure


def _scatter(axes: Axes, points: np.ndarray, labels: Sequence[str]) -> None:
    for color, marker, label in zip(_COLORS, _MARKERS, dict.fromkeys(labels), strict=False):
        of_label = points[np.array(labels) == label]
        axes.scatter(of_label[:, 0], of_label[:, 1], s=14, c=color, marker=marker, alpha=0.8, label=label)
    axes.set_xticks([])
    axes.set_yticks([])
