"""The page of `convergence`: the curves of the losses, the most likely tokens, the consistency condition."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from reknow.evaluation.intervals import average_cases
from reknow.evaluation.results import Cell
from reknow.files.atomic import atomic_write, write_text
from reknow.files.json_lines import Rows
from reknow.files.manifest import read_manifest
from reknow.report.plots import FAINT, PALETTE, STYLE, save_png
from reknow.studies.ice.convergence import KEY, ROWS_FILE, SHOWN, TARGETS, TEMPERATURES
from reknow.texts.tables import to_markdown

_Curve = list[tuple[float, float, float]]
"""(mean, low, high) step by step."""


def write_convergence(run_folder: Path, out: Path | None = None) -> Path:
    """Writes `convergence.md` and `convergence.png` of what `inside` measured, finished or not; gives the page.

    Args:
        out: another folder for them.
    """
    manifest, rows = read_manifest(run_folder), Rows.reading(run_folder / ROWS_FILE, KEY)
    folder = out or run_folder
    atomic_write(folder / "convergence.png", lambda path: save_png(_losses_figure(_loss_curves(rows)), Path(path)))
    text, answer = manifest["settings"]["edits"][0]
    count = len(manifest["settings"]["edits"])
    parts = [
        f"# Inside In-Context Editing: {manifest['model']}",
        f"{count} edits, each by itself; means over edits [95 % bootstrap interval].",
        f"**The consistency condition.** {_CONDITION}\n\n{to_markdown(_divergence_table(rows))}",
        f"**Losses.** {_LOSSES}\n\n![Losses by step](convergence.png)\n\n{to_markdown(_repetitions_table(rows))}",
        f"**Most likely tokens behind the new answer**, “{text}” → “{answer}”, dynamic targets, temperature "
        f"{TEMPERATURES[-1]:g}.\n\n{to_markdown(_top_tokens_table(rows))}",
    ]
    return write_text(folder / "convergence.md", "\n\n".join(parts) + "\n")


_CONDITION = (
    "KL(p(· given c, q) ‖ p(· given q)) at the new answer's tokens and the one behind, over the built-in "
    "introductions; 0 is a model that says without the context what it says with it."
)
_LOSSES = (
    "ICE's loss before each step, −log p([y*, x] | q) per token, x sampled at that temperature from the model as it "
    "is (dynamic) or as it was (static). No early end."
)


def _loss_curves(rows: Mapping[tuple, dict]) -> dict[str, _Curve]:
    """Setting → its loss over the edits."""
    curves: dict[str, _Curve] = {}
    for label, found in _measured(rows, "losses", "losses").items():
        columns = zip(*(row["losses"] for row in found), strict=True)
        steps = [average_cases([{"loss": value} for value in step])["loss"] for step in columns]
        curves[label] = [
            (mean, mean if low is None else low, mean if high is None else high) for mean, low, high, _ in steps
        ]
    return curves


def _losses_figure(curves: Mapping[str, _Curve]) -> Figure:
    """A panel for static and one for dynamic targets, a line per temperature; bands: 95 % intervals over edits."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 2.8), layout="constrained")
        panels = figure.subplots(1, len(TARGETS), sharey=True)
        for axes, targets in zip(panels, TARGETS, strict=True):
            for number, temperature in enumerate(TEMPERATURES):
                curve = curves.get(f"{targets}, T = {temperature:g}")
                if curve:
                    means, lows, highs = zip(*curve, strict=True)
                    axes.plot(means, color=PALETTE[number], label=f"T = {temperature:g}")
                    axes.fill_between(range(len(means)), lows, highs, color=PALETTE[number], alpha=0.15, linewidth=0)
            axes.set_title(f"{targets} targets", fontsize=9)
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color=FAINT, linewidth=0.4)
        panels[0].set_ylabel("loss, nats per token")
        panels[0].legend(frameon=False, fontsize=8)
    return figure


def _divergence_table(rows: Mapping[tuple, dict]) -> list[list[str]]:
    """Header and a line per method: the divergence, and the edit's success."""
    lines = [["model", "edits", "divergence, nats", "success, teacher-forced exact, %"]]
    for label, values in _measured(rows, "consistency", "divergence").items():
        means = average_cases([{key: float(row[key]) for key in ("divergence", "success")} for row in values])
        divergence = Cell(label, "", "divergence", "edit", *means["divergence"])
        success = Cell(label, "", "success", "teacher_forced_exact", *means["success"])
        lines.append(
            [label, str(len(values)), *(f"{c.number()} {c.interval()}".strip() for c in (divergence, success))]
        )
    return lines


def _repetitions_table(rows: Mapping[tuple, dict]) -> list[list[str]]:
    """Header and a line per target and temperature: sampled tokens of a descent that stood in the answer already."""
    lines = [["sampling", "loss at the end", "the answer's loss at the end", "repeated tokens in a descent"]]
    for label, values in _measured(rows, "losses", "losses").items():
        means = average_cases(
            [
                {
                    "loss": row["losses"][-1],
                    "answer": row["answer_losses"][-1],
                    "repetitions": float(sum(row["repetitions"])),
                }
                for row in values
            ]
        )
        cells = [Cell(label, "", key, "edit", *means[key]) for key in ("loss", "answer", "repetitions")]
        lines.append([label, *(f"{cell.number()} {cell.interval()}".strip() for cell in cells)])
    return lines


def _top_tokens_table(rows: Mapping[tuple, dict]) -> list[list[str]]:
    """Header and a line per step shown, for the first edit."""
    lines = [["step", "with the context", "without"]]
    for row in rows.values():
        for step, tokens in zip(SHOWN, row.get("likeliest", ()), strict=False):
            lines.append([str(step), *(" ".join(map(_visible, tokens[side])) for side in ("with", "without"))])
    return lines


def _visible(token: str) -> str:
    """The token in code marks, with its spaces and line breaks to be seen."""
    return f"`{json.dumps(token, ensure_ascii=False)[1:-1].replace(' ', '␣').replace('`', '´')}`"


def _measured(rows: Mapping[tuple, dict], part: str, key: str) -> dict[str, list[dict]]:
    """Label → the rows of a part that have the value, in the order they came."""
    found: dict[str, list[dict]] = {}
    for (of, label, _), row in rows.items():
        if of == part and key in row:
            found.setdefault(label, []).append(row)
    return found
