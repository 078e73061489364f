"""The pictures of all methods in a plane, from the tables of their pages.

python scripts/draw_choice.py            writes docs/figures/choice.png and same_subject.png
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib.figure import Figure

from reknow.registry import FAMILIES

DOCS = Path(__file__).parent.parent / "docs"
COLOURS = dict(zip(FAMILIES, ("#0969da", "#bc4c00", "#1a7f37", "#8250df"), strict=True))


class Picture(NamedTuple):
    """Methods of a page's table in a plane: the upper right is best."""

    file: str
    page: str
    row: re.Pattern[str]
    """A line of the table: the method, and the numbers named x and y."""
    title: str
    x: str
    y: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    legend: Literal["lower left", "center right"]
    beside: dict[str, tuple[float, float]]
    """Where a name stands beside its point, in points, where names would cover each other."""


PICTURES = (
    Picture(
        "choice.png",
        "which_method.md",
        re.compile(r"^\| `(?P<name>[\w-]+)` \| [\d.]+ \| (?P<y>[\d.]+) \| (?P<x>[\d.]+) \|", re.MULTILINE),
        "SmolLM2, 20 known facts of CounterFact, each edited by itself",
        "neighbours as before, %",
        "paraphrases that follow, %",
        (10, 106),
        (0, 92),
        "lower left",
        {
            "r-rome": (6, 5), "rome": (-30, 6), "simie": (-31, -3), "stableedit": (-8, 7),
            "emmet": (-36, -6), "memit": (-34, -9), "alphaedit": (-46, -12),
            "memit-fe": (8, 4), "betaedit": (8, 2), "sphere": (8, -7), "evoedit": (8, -9),
            "pmet": (8, -3), "ft-t": (-22, -11), "ft-uke": (8, 2), "locft-bf": (8, -7), "ft-m": (7, 3),
            "grace": (8, -3), "melo": (8, -4), "adalora": (-18, -12), "ke": (-15, 2), "unke": (-27, -3),
            "memoir": (8, -4),
        },
    ),
    Picture(
        "same_subject.png",
        "results/same_subject.md",
        re.compile(r"^\| `(?P<name>[\w-]+)` \| \d+[^|]*\| (?P<x>[\d.]+)[^|]*\| (?P<y>[\d.]+)[^|]*\|", re.MULTILINE),
        "SmolLM2, 20 known facts of wiki_counterfact, each edited by itself",
        "other questions about the same subject as before, %",
        "consequences that follow, %",
        (0, 70),
        (0, 64),
        "center right",
        {
            "rome": (-8, -24), "memit": (-8, -12), "alphaedit": (-8, -36), "ft-t": (-12, 6), "emmet": (4, -11),
            "r-rome": (8, -3), "pmet": (8, -3), "ft-m": (8, 1), "adalora": (8, -6), "lora": (-10, 6),
            "ice": (-6, -13), "ultraedit": (8, -6), "wise": (8, -2), "defer": (-8, -13), "ike": (-8, 7),
            "ike-zero": (7, 1), "locft-bf": (8, -3), "serac": (8, -3),
        },
    ),
)  # fmt: skip


def draw(picture: Picture) -> Figure:
    """The picture from the table as it stands on its page."""
    text = (DOCS / picture.page).read_text(encoding="utf-8")
    found = {row["name"]: (float(row["x"]), float(row["y"])) for row in picture.row.finditer(text)}
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for family, methods in FAMILIES.items():
        known = [name for name in methods if name in found]
        axes.scatter(*zip(*(found[name] for name in known), strict=True), s=34, color=COLOURS[family], label=family)
        for name in known:
            shift = picture.beside.get(name, (6, 4))
            axes.annotate(
                name, found[name], xytext=shift, textcoords="offset points", fontsize=8, color=COLOURS[family]
            )
    axes.set_xlim(*picture.x_range)
    axes.set_ylim(*picture.y_range)
    axes.set_xlabel(picture.x)
    axes.set_ylabel(picture.y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc=picture.legend, fontsize=8)
    axes.set_title(picture.title, loc="left", fontsize=10)
    return figure


def main() -> None:
    for picture in PICTURES:
        draw(picture).savefig(DOCS / "figures" / picture.file, dpi=130)


if __name__ == "__main__":
    main()
