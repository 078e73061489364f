"""The picture of the README: an edit of a real model before and after, and where the fact sat. Half a minute of work.

    python scripts/draw_readme.py            writes docs/figures/edit.png and edit_dark.png

Everything in it is read from SmolLM2-135M-Instruct as the script runs.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from reknow import LM, ROME, Edit
from reknow.datasets import load_facts
from reknow.report.heat_map import scale_of
from reknow.report.trace_words import label_tokens
from reknow.tracing.causal import Trace, Tracing, embedding_std, trace_prompt

OUT = Path(__file__).parent.parent / "docs" / "figures"
EDIT = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English", target_true="French")
ASKED = {
    "the edit": EDIT.text,
    "in other words": "Danielle Darrieux is a native speaker of",
    "somebody else": "The mother tongue of Charles de Gaulle is",
}
ANSWERS = (EDIT.target_true, EDIT.target_new)
COLOURS = {
    False: {"text": "#1f2328", "before": "#b8bec6", "after": "#0969da", "rest": "#8b949e"},
    True: {"text": "#e6edf3", "before": "#6e7681", "after": "#58a6ff", "rest": "#7d8590"},
}
"""By whether the page is dark; the background is the page's own."""


def read(lm: LM) -> list[list[float]]:
    """The probability of each answer behind each prompt. (prompts, answers)"""
    pairs = [(prompt, answer) for prompt in ASKED.values() for answer in ANSWERS]
    scores = lm.score([prompt for prompt, _ in pairs], [str(answer) for _, answer in pairs])
    values = [math.exp(-score.nll) for score in scores]
    return [values[i : i + len(ANSWERS)] for i in range(0, len(values), len(ANSWERS))]


def draw_bars(axes, before: list[list[float]], after: list[list[float]], colours: dict[str, str]) -> None:
    """Two bars for each answer behind each prompt: before in grey, after in colour."""
    ticks, names = [], []
    for row, (kind, prompt) in enumerate(ASKED.items()):
        for column, answer in enumerate(ANSWERS):
            place = row * 3.2 + column * 1.1
            for shift, values, colour in ((-0.22, before, "before"), (0.22, after, "after")):
                value = values[row][column]
                axes.barh(place + shift, value, height=0.4, color=colours[colour])
                axes.text(value + 0.015, place + shift, f"{100 * value:.0f} %", va="center", fontsize=8)
            ticks.append(place)
            names.append(answer)
        axes.text(0, row * 3.2 - 0.75, f"{prompt} …", fontsize=9, weight="bold")
        axes.text(1.16, row * 3.2 - 0.75, kind, fontsize=9, ha="right", color=colours["rest"])
    axes.set_yticks(ticks, names)
    axes.set_xlim(0, 1.16)
    axes.set_ylim(len(ASKED) * 3.2 - 1.3, -1.2)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("before", loc="left", fontsize=10, color=colours["before"], weight="bold")
    title = {"fontsize": 10, "color": colours["after"], "transform": axes.transAxes}
    axes.text(0.135, 1.027, "and after one edit: how likely the answer is", **title)


def draw_trace(axes, trace: Trace, colours: dict[str, str]) -> None:
    """What each token's state, put back, gives of the answer that noise on the subject took away."""
    labels, (low, high, _) = label_tokens(trace), scale_of(trace)
    shades = LinearSegmentedColormap.from_list("shades", [f"{colours['after']}08", colours["after"]])
    axes.imshow(trace.restored["hidden"].numpy(), cmap=shades, vmin=low, vmax=high, aspect="auto")
    names = ["-" * bool(one.before) + one.token + "-" * bool(one.after) for one in labels]
    axes.set_yticks(range(len(labels)), names)
    for tick, label in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_weight("bold" if label.in_subject else "normal")
    axes.set_xlabel("layer", fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"Where “{trace.answer.strip()}” sat: states that bring it back", loc="left", fontsize=10)


def draw(before: list[list[float]], after: list[list[float]], trace: Trace, dark: bool) -> Figure:
    colours = COLOURS[dark]
    text = {key: colours["text"] for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")}
    with matplotlib.rc_context({**text, "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(10.4, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        draw_bars(left, before, after, colours)
        draw_trace(right, trace, colours)
    return figure


def main() -> None:
    lm = LM.demo("smollm2")
    trace = trace_prompt(
        lm, EDIT.prompt, str(EDIT.subject), embedding_std(lm, load_facts("known_1000")), Tracing(kinds=("hidden",))
    )
    before = read(lm)
    with lm.patched(ROME().edit(lm, [EDIT])):
        after = read(lm)
    for dark in (False, True):
        file = OUT / ("edit_dark.png" if dark else "edit.png")
        draw(before, after, trace, dark).savefig(file, dpi=130, transparent=True)
        print(file)


if __name__ == "__main__":
    main()
