"""A table, given as lines of cells of which the first are the column names, as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence


def to_markdown(lines: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    header, *rest = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rest])


def to_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """The table's lines with their cells one below the other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def to_csv(lines: Iterable[Sequence[object]]) -> str:
    """The table as comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
