"""A study over several data sets on one page: its table in the form of the papers, the sets in numbers, a figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from reknow.evaluation.intervals import average_cases
from reknow.evaluation.results import UNEDITED_BEFORE, Results
from reknow.evaluation.stages import BEFORE, IN_CONTEXT, UNEDITED, stage_label, stage_order
from reknow.files.atomic import atomic_write, write_text
from reknow.report import contents
from reknow.report.plots import FAINT, INK, PALETTE, STYLE, save_png
from reknow.studies.ice.script_ppl_r import METRIC as SCRIPT_PPL_R
from reknow.texts.tables import to_markdown
from reknow.texts.writing import pieces

_PROTOCOL = "teacher_forced_tokens"
_COLUMNS = {
    "success": f"reliability@{_PROTOCOL}",
    "written": "reliability@generated",
    "paraphrases": f"generalization@{_PROTOCOL}",
    "portability": f"portability@{_PROTOCOL}",
    "locality": f"locality@{_PROTOCOL}",
    "fluency": "fluency@sampled",
    "PPL_r": "PPL_r@sampled",
    "PPL_r, script": SCRIPT_PPL_R,
    "seconds": "seconds@edit",
}
"""What the papers' tables show, and how it was read: the protocol of EasyEdit, whose tables these are. Also
success where the model writes by itself, which sees what teacher forcing does not: a last word that goes on."""
_SHARES = ("success", "written", "paraphrases", "portability", "locality")
_POOLED = "all sets"
_ENOUGH = 0.8
"""Share of successful edits from which PPL_r says something."""
_NOTE = (
    f"Success, paraphrases, portability, locality: `{_PROTOCOL}`, %; written: success, `generated`. Fluency: "
    "`sampled`, bits × 100. PPL_r: `sampled`, mean of logarithms; script: plain mean, each token's probability read "
    "one place too late, as in the script of its authors. † success below 80 %: a model that ignores an edit is "
    "fluent, so PPL_r says nothing. Seconds: per edit, on a machine as loaded as it was. Means over cases [95 % "
    "bootstrap interval]."
)


def write_study(title: str, runs: Mapping[str, Results], folder: str | Path) -> Path:
    """Writes `study.md` and `study.png` into the study's folder, from one run per set or one over all.

    Returns:
        The path of the page.
    """
    folder = Path(folder)
    sets = split_by_set(runs)
    parts = [
        f"# {title}",
        *_about(next(iter(runs.values()))),
        f"**The sets.**\n\n{to_markdown(_set_statistics(sets))}",
    ]
    found = {stage for results in sets.values() for _, stage, _ in results.cells} - {BEFORE}
    for stage in sorted(found, key=lambda stage: (stage == IN_CONTEXT, stage_order(stage))):
        for name, results in {**sets, _POOLED: _pool_sets(sets)}.items():
            lines = _study_table(results, stage)
            if len(lines) > 1:
                parts.append(f"**{name}, {stage_label(stage)}**\n\n{to_markdown(lines)}")
    last = next(iter(runs.values())).last_stage
    gains = _difference_table(_pool_sets(sets), last)
    if len(gains) > 1:
        parts.append(f"**Differences on the same cases of {_POOLED}, {stage_label(last)}**\n\n{to_markdown(gains)}")
    parts += [_NOTE, "![Portability and locality](study.png)"]
    atomic_write(folder / "study.png", lambda path: save_png(_trade_off_figure(sets), Path(path)))
    return write_text(folder / "study.md", "\n\n".join(parts) + "\n")


def split_by_set(runs: Mapping[str, Results]) -> dict[str, Results]:
    """Data set → its results; a run over several sets is taken apart by the names of its cases."""
    found: dict[str, Results] = {}
    for results in runs.values():
        for name in dict.fromkeys(_set(case) for (case,) in results.before):
            before = {key: row for key, row in results.before.items() if _set(row["case"]) == name}
            rows = {key: row for key, row in results.rows.items() if _set(row["case"]) == name}
            found[name] = replace(results, before=before, rows=rows)
    return found


def _set(case: str) -> str:
    return case.rpartition("/")[0]


def _pool_sets(sets: Mapping[str, Results]) -> Results:
    """The cases of all sets together."""
    parts = list(sets.values())
    before, rows, added = (
        {key: row for part in parts for key, row in getattr(part, name).items()}
        for name in ("before", "rows", "added")
    )
    return Results(parts[0].manifest, before, rows, added)


def _study_table(results: Results, stage: str) -> list[list[str]]:
    """Header and a line per method at one stage, the unedited model first; columns without numbers are left out."""
    methods = [*results.manifest["settings"]["methods"]]
    groups = [(UNEDITED, stage)] if stage == IN_CONTEXT else [UNEDITED_BEFORE]
    groups += [(method, stage) for method in methods]
    groups = [group for group in groups if any(key[:2] == group for key in results.cells)]
    names = [n for n, key in _COLUMNS.items() if any((method, read, key) in results.cells for method, read in groups)]
    lines = [["method", "cases", *names]]
    for method, read in groups:
        success = results.cells.get((method, read, _COLUMNS["success"]))
        texts = []
        for name in names:
            cell = results.cells.get((method, read, _COLUMNS[name]))
            if cell is not None and name == "fluency":
                cell = cell._replace(mean=100 * cell.mean, low=_times(cell.low), high=_times(cell.high))
            mark = "†" if name.startswith("PPL_r") and (success is None or success.mean < _ENOUGH) else ""
            texts.append("–" if cell is None else f"{cell.number()}{mark} {cell.interval()}".strip())
        lines.append([method, str(success.cases if success else 0), *texts])
    return lines


def _difference_table(results: Results, stage: str) -> list[list[str]]:
    """Header and a line per method but the first: what the first has more, in points, over the cases of both."""
    first, *others = results.manifest["settings"]["methods"]
    mine = results.case_values.get((first, stage), {})
    names = [name for name in _SHARES if any(_COLUMNS[name] in values for values in mine.values())]
    keys = [_COLUMNS[name] for name in names]
    lines = [[f"`{first}` over", *names]]
    for method in others:
        theirs = results.case_values.get((method, stage), {})
        pairs = [(values, theirs[case]) for case, values in mine.items() if case in theirs]
        gains = [{key: one[key] - two[key] for key in keys if key in one and key in two} for one, two in pairs]
        found = average_cases(gains) if gains else {}
        cells = [found.get(key) for key in keys]
        lines.append([method, *("–" if cell is None else _points(*cell) for cell in cells)])
    return lines


def _points(mean: float, low: float | None, high: float | None, cases: int) -> str:
    bounds = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * mean:+.1f}{bounds}"


def _times(bound: float | None) -> float | None:
    return None if bound is None else 100 * bound


def _set_statistics(sets: Mapping[str, Results]) -> list[list[str]]:
    """Header and a line per set: cases, mean words of prompt and answer, probes of each kind per case."""
    kinds = ("generalization", "portability", "locality", "fluency")
    lines = [["set", "cases", "words of a prompt", "words of an answer", *(f"{kind} per case" for kind in kinds)]]
    for name, results in sets.items():
        rows, count = list(results.before.values()), len(results.before)
        asked = Counter(reading["kind"] for row in rows for reading in row["readings"])
        requests = [row["readings"][0] for row in rows]
        words = [
            sum(len(pieces(text)) for text in texts) / count
            for texts in ([r["prompt"] for r in requests], [r["answers"][0] for r in requests])
        ]
        per_case = [f"{asked[kind] / count:.1f}" if asked[kind] else "–" for kind in kinds]
        lines.append([name, str(count), *(f"{number:.1f}" for number in words), *per_case])
    return lines


def _trade_off_figure(sets: Mapping[str, Results]) -> Figure:
    """A panel per set: a method's portability (or success, where a set has none) against its locality, with
    intervals; the upper right is best."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.5 * len(sets), 3.1), layout="constrained")
        panels = figure.subplots(1, len(sets), squeeze=False)[0]
        for axes, (name, results) in zip(panels, sets.items(), strict=True):
            held = any(key[2] == _COLUMNS["portability"] for key in results.cells)
            across, up = "portability" if held else "success", "locality"
            for number, method in enumerate(results.manifest["settings"]["methods"]):
                found = [results.cells.get((method, results.last_stage, _COLUMNS[key])) for key in (across, up)]
                pair = [cell for cell in found if cell is not None]
                if len(pair) < 2:
                    continue
                color = PALETTE[number % len(PALETTE)]
                (x, x_low, x_high), (y, y_low, y_high) = (
                    [100 * (cell.mean if value is None else value) for value in (cell.mean, cell.low, cell.high)]
                    for cell in pair
                )
                axes.plot([x_low, x_high], [y, y], color=color, linewidth=0.8, alpha=0.6)
                axes.plot([x, x], [y_low, y_high], color=color, linewidth=0.8, alpha=0.6)
                axes.plot(x, y, "o", color=color, markersize=6, label=method)
            axes.set(xlim=(-4, 104), ylim=(-4, 104), xlabel=f"{across}, %", title=name)
            axes.title.set_fontsize(9)
            axes.grid(color=FAINT, linewidth=0.4)
        panels[0].set_ylabel("locality, %", color=INK)
        shown = {
            label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if shown:
            place = {"loc": "outside lower center", "ncols": min(7, len(shown))}
            figure.legend(shown.values(), shown.keys(), **place, frameon=False, fontsize=8)
    return figure


def _about(results: Results) -> list[str]:
    facts = contents.describe_run(results)
    return ["\n".join(f"- {name}: {facts[name]}" for name in ("Model", "Mode", "Seeds", "Machine", "Software"))]
