"""A table, given as lines of cells of which the first are the column names, as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence


def to_markdown(lines: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    header, *rest = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rest])


_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"}
    | {
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "–": "--",
        "≈": r"$\approx$",
        "★": r"$\star$",
        "→": r"$\to$",
        "‖": r"$\|$",
    }
)


def escape_latex(text: str) -> str:
    """The text on one line, as LaTeX prints it. No bracket begins it: the end of the line before would take it."""
    text = " ".join(text.split()).translate(_LATEX)
    return "{}" + text if text.startswith(("[", "*")) else text


def to_latex(lines: Sequence[Sequence[str]], caption: str) -> str:
    """The table for the package booktabs; what is behind the first two columns stands to the right."""
    header, *rest = [" & ".join(map(escape_latex, line)) + r" \\" for line in lines]
    columns = "ll" + "r" * (len(lines[0]) - 2)
    begin = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
    ]
    end = [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join([*begin, r"\toprule", header, r"\midrule", *rest, *end])


def to_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """The table's lines with their cells one below the other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def to_csv(lines: Iterable[Sequence[object]]) -> str:
    """The table as comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
