"""Edit gradients of several tasks as points in the plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_MARKERS = ("o", "s", "^", "x")


def gradient_figure(panels: Mapping[str, np.ndarray], labels: Sequence[str]) -> Figure:
    """A panel of points for each title, two in a row; colour and marker by label.

    Args:
        panels: title → (points, 2).
        labels: of the points, in the same order in every panel.
    """
    with matplotlib.rc_context({"text.parse_math": False}):  # labels are what users name their tasks
        return _figure(panels, labels)


def _figure(panels: Mapping[str, np.ndarray], labels: Sequence[str]) -> Figure:
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(8, 3.6 * rows + 0.4), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, min(2, len(panels)))).ravel()
    for letter, axes, (title, points) in zip("abcdefgh", grid, panels.items(), strict=False):
        for color, marker, label in zip(_COLORS, _MARKERS, dict.fromkeys(labels), strict=False):
            of_label = points[np.array(labels) == label]
            axes.scatter(of_label[:, 0], of_label[:, 1], s=14, c=color, marker=marker, alpha=0.8, label=label)
        axes.set_title(f"({letter}) {title}", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure
