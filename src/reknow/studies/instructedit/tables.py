"""The tables of a study: means with intervals, and paired gains on a baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from reknow.evaluation.intervals import Mean, average_cases, resample
from reknow.evaluation.stages import UNEDITED
from reknow.files.atomic import write_json, write_text
from reknow.texts.tables import to_csv, to_markdown

_METRICS = (
    ("reliability@teacher_forced_tokens", "Reliability, share of tokens, asked plainly, %"),
    ("reliability@teacher_forced_exact", "Reliability, every token, asked plainly, %"),
    (
        "instructed@teacher_forced_tokens",
        "Reliability, share of tokens, asked behind the instruction as the authors do, %",
    ),
    (
        "as_trained@teacher_forced_tokens",
        "Reliability, share of tokens, each asked as it was trained: behind the instruction or plainly, %",
    ),
    ("generalization@teacher_forced_tokens", "Generalization, share of tokens, %"),
    ("locality@teacher_forced_tokens", "Locality, share of tokens as before, %"),
    ("portability@teacher_forced_tokens", "Portability, share of tokens, %"),
    ("sentiment@likelihood", "ConvSent's success z_sentiment · z_topic, %"),
    ("drawdown@divergence", "ConvSent's drawdown, nats · 100"),
    ("fluency@sampled", "Fluency of sampled text, bits · 100"),
)


_Values = Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]
"""(editor, task) → case → metric → value."""


def gain(
    values: _Values, label: str, baseline: str, metric: str, tasks: Sequence[str]
) -> tuple[float, float, float, int] | None:
    """The mean over tasks of a metric's paired difference, its interval over cases, and how many tasks have it."""
    means = []
    for task in tasks:
        ours, theirs = values.get((label, task), {}), values.get((baseline, task), {})
        both = [case for case in ours if case in theirs and metric in ours[case]]
        if both:
            means.append(resample(np.array([ours[case][metric] - theirs[case][metric] for case in both])))
    if not means:
        return None
    whole = np.mean(means, axis=0)
    low, high = np.percentile(whole[1:], (2.5, 97.5))
    return float(whole[0]), float(low), float(high), len(means)


def write_tables(folder: Path, name: str, question: str, values: _Values, baseline: str, unit: str = "task") -> str:
    """Writes `NAME.md`, `NAME.csv` and `NAME.json`; gives the tables.

    Args:
        unit: what the editors were read on.
    """
    text = _tables(question, values, baseline, unit)
    write_text(folder / f"{name}.md", text)
    write_text(folder / f"{name}.csv", to_csv(_numbers(values)))
    write_json(folder / f"{name}.json", {f"{label} | {task}": cases for (label, task), cases in values.items()})
    return text


def _tables(question: str, values: _Values, baseline: str, unit: str) -> str:
    """Markdown: a table for each metric; rows are editors, columns tasks and the gain on the baseline."""
    parts = [question]
    labels, tasks = (list(dict.fromkeys(names)) for names in zip(*values, strict=True))
    for metric, title in _METRICS:
        # Fluency is to stay what it was before.
        against = UNEDITED if metric.startswith("fluency") and UNEDITED in labels else baseline
        lines = [["editor", *tasks, f"gain on {against}"]]
        for label in labels:
            cells = [_cell(values.get((label, task), {}), metric) for task in tasks]
            if any(cell != "–" for cell in cells):
                found = None if label == against else gain(values, label, against, metric, tasks)
                lines.append([label, *cells, "–" if found is None else _gain_cell(*found, unit)])
        if len(lines) > 1:
            parts.append(f"**{title}** (`{metric}`)\n\n{to_markdown(lines)}")
    return "\n\n".join(parts) + "\n"


def _cell(cases: Mapping[str, Mapping[str, float]], metric: str) -> str:
    found = average_cases(list(cases.values())).get(metric) if cases else None
    if found is None:
        return "–"
    value, low, high, _ = found
    return f"{100 * value:.1f}" + ("" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]")


def _gain_cell(value: float, low: float, high: float, count: int, unit: str) -> str:
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] ({count} {unit}{'s' * (count > 1)})"


def _numbers(values: _Values) -> Iterator[Sequence[object]]:
    yield "editor", "task", "metric", *Mean._fields
    for (label, task), cases in values.items():
        for metric, mean in average_cases(list(cases.values())).items():
            yield label, task, metric, *mean
