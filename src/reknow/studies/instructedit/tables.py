"""The tables of a study: means with intervals, and paired gains on a baseline."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from reknow.evaluation.results import RESAMPLES, summarise
from reknow.files.atomic import write_json, write_text

METRICS = (
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
)


Values = Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]
"""(editor, task) → case → metric → value."""


def gain(
    values: Values, label: str, baseline: str, metric: str, tasks: Sequence[str]
) -> tuple[float, float, float, int] | None:
    """Mean over tasks of a metric's paired difference, its 95 % bootstrap interval over cases, and how many tasks."""
    draws = []
    for task in tasks:
        ours, theirs = values.get((label, task), {}), values.get((baseline, task), {})
        both = [case for case in ours if case in theirs and metric in ours[case]]
        pairs = [ours[case][metric] - theirs[case][metric] for case in both]
        if pairs:
            differences = np.array(pairs)
            chosen = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))
            draws.append(np.concatenate([[differences.mean()], differences[chosen].mean(1)]))
    if not draws:
        return None
    means = np.mean(draws, axis=0)
    low, high = np.percentile(means[1:], (2.5, 97.5))
    return float(means[0]), float(low), float(high), len(draws)


def written(
    folder: Path,
    name: str,
    question: str,
    values: Values,
    baseline: str,
    tasks: Sequence[str],
    unit: str = "task",
) -> str:
    """Writes `NAME.md`, `NAME.csv` and `NAME.json`; gives the tables."""
    text = _tables(question, values, baseline, tasks, unit)
    write_text(folder / f"{name}.md", text)
    write_text(folder / f"{name}.csv", _csv(values))
    write_json(folder / f"{name}.json", {f"{label} | {task}": found for (label, task), found in values.items()})
    return text


def _tables(question: str, values: Values, baseline: str, tasks: Sequence[str], unit: str) -> str:
    """Markdown: a table for each metric; rows are editors, columns tasks and the gain on the baseline."""
    lines = [question, ""]
    labels = list(dict.fromkeys(label for label, _ in values))
    for metric, title in METRICS:
        rows = []
        for label in labels:
            cells = [_cell(values.get((label, task), {}), metric) for task in tasks]
            if any(cell != "–" for cell in cells):
                found = None if label == baseline else gain(values, label, baseline, metric, tasks)
                rows.append([label, *cells, "–" if found is None else _gained(*found, unit)])
        if rows:
            lines += [f"**{title}** (`{metric}`)", ""]
            lines += [f"| editor | {' | '.join(tasks)} | gain on {baseline} |", "|---" * (len(tasks) + 2) + "|"]
            lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join(lines)


def _cell(cases: Mapping[str, Mapping[str, float]], metric: str) -> str:
    found = summarise([dict(case) for case in cases.values()]).get(metric) if cases else None
    if found is None:
        return "–"
    value, low, high, _ = found
    return f"{100 * value:.1f}" + ("" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]")


def _gained(value: float, low: float, high: float, count: int, unit: str) -> str:
    return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] ({count} {unit}{'s' * (count > 1)})"


def _csv(values: Values) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["editor", "task", "metric", "mean", "low", "high", "cases"])
    for (label, task), cases in values.items():
        for metric, numbers in summarise([dict(case) for case in cases.values()]).items():
            writer.writerow([label, task, metric, *numbers])
    return text.getvalue()
