"""The picture of the page that helps to choose a method, from the table on it.

python scripts/draw_choice.py            writes docs/figures/choice.png
"""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure

from reknow.registry import FAMILIES

DOCS = Path(__file__).parent.parent / "docs"
COLOURS = dict(zip(FAMILIES, ("#0969da", "#bc4c00", "#1a7f37", "#8250df"), strict=True))
ROW = re.compile(r"^\| `([\w-]+)` \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|", re.MULTILINE)
BESIDE = {
    "r-rome": (6, 5), "rome": (-30, 6), "emmet": (-38, 0), "memit": (8, -2), "alphaedit": (8, -10), "pmet": (8, -3),
    "ft-t": (-22, -11), "locft-bf": (8, -3), "ft-m": (7, 3), "grace": (8, -3), "melo": (8, -4), "adalora": (-44, -4),
    "ke": (-15, 2),
}  # fmt: skip
"""Where a name stands beside its point, in points, where names would cover each other."""


def draw(rows: dict[str, tuple[float, float]]) -> Figure:
    """Paraphrases over neighbours: the upper right is best."""
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for family, methods in FAMILIES.items():
        known = [name for name in methods if name in rows]
        places = [rows[name] for name in known]
        axes.scatter([x for _, x in places], [y for y, _ in places], s=34, color=COLOURS[family], label=family)
        for name, (y, x) in zip(known, places, strict=True):
            shift = BESIDE.get(name, (6, 4))
            axes.annotate(name, (x, y), xytext=shift, textcoords="offset points", fontsize=8, color=COLOURS[family])
    axes.set_xlim(10, 106)
    axes.set_ylim(0, 92)
    axes.set_xlabel("neighbours as before, %")
    axes.set_ylabel("paraphrases that follow, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", fontsize=8)
    axes.set_title("SmolLM2, 20 known facts of CounterFact, each edited by itself", loc="left", fontsize=10)
    return figure


def main() -> None:
    page = (DOCS / "which_method.md").read_text(encoding="utf-8")
    rows = {name: (float(y), float(x)) for name, y, x in ROW.findall(page)}
    draw(rows).savefig(DOCS / "figures" / "choice.png", dpi=130)


if __name__ == "__main__":
    main()
