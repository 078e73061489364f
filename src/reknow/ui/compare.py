"""Runs of `reknow bench`: one as its report, several side by side, in the reports' own pages."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from reknow.errors import InputError
from reknow.evaluation.results import Results
from reknow.progress import progress
from reknow.report.comparison import compare, render_comparison
from reknow.report.page import render_page
from reknow.report.run_list import Run, find_runs, name_runs
from reknow.ui.desks import Desk, RunsPage
from reknow.ui.drawing import draw
from reknow.ui.frame import Frame

ADDRESS = "compared"
"""Where the application answers with what a desk has; see `make_app`."""
_NONE_FOUND = (
    "No run below the folder in which this page was started. reknow bench --data counterfact --methods rome,ft-m "
    "--limit 20 --out runs/first makes one."
)
_EMPTY = "Nothing shown yet: choose a run for its report, or several to compare them over the cases that all have."
_GROW = """
const fit = () => {
  const frame = element.querySelector("iframe");
  if (!frame) return;
  const follow = () => {
    const inside = frame.contentDocument?.documentElement;
    if (!inside || frame.contentDocument.URL === "about:blank") return;
    const grow = () => { frame.style.height = `${Math.ceil(inside.getBoundingClientRect().height)}px`; };
    new ResizeObserver(grow).observe(inside);
  };
  frame.addEventListener("load", follow);
  if (frame.contentDocument?.readyState === "complete") follow();
};
watch("value", fit);
fit();
"""
"""The report is as high as what it holds, so that the page has one scroll bar."""


class CompareScreen:
    """The runs to choose from, and the page of those that are chosen.

    Args:
        tab: in which the screen is: the list is read when it is opened.
    """

    def __init__(self, frame: Frame, tab: Any):
        self._frame = frame
        self.listed = gr.CheckboxGroup([], label="Runs", elem_id="runs")
        self.none = gr.HTML(visible=False, elem_id="no-runs", apply_default_css=False)
        with gr.Row(equal_height=False, elem_id="run-row"):
            self.path = gr.Textbox(
                "",
                label="Another run",
                info="The path of its folder.",
                max_lines=1,
                scale=4,
                min_width=300,
                elem_id="run-path",
            )
            self.again = gr.Button("Look again", scale=1, min_width=110, elem_id="look-again")
            self.go = gr.Button("Show", variant="primary", scale=1, min_width=110, elem_id="show-runs")
        self.result = gr.HTML(elem_id="compared", apply_default_css=False, js_on_load=_GROW)
        self.outputs, self.fields = [self.result], [self.listed, self.path]
        for event in (tab.select, self.again.click):
            frame.at_once(event, self._list, [self.listed], [self.listed, self.none])
        for event in (self.go.click, self.path.submit):
            frame.run(event, "reading the runs", self._show, [self.listed, self.path])

    def _list(self, chosen: list[str]) -> list[Any]:
        runs = find_runs(self._frame.access.runs)
        return [
            gr.update(choices=_choices(runs, chosen), value=chosen, visible=bool(runs or chosen)),
            gr.update(value=draw("nothing", _NONE_FOUND), visible=not (runs or chosen)),
        ]

    def _show(self, desk: Desk, chosen: list[str], typed: str) -> None:
        typed = typed.strip()
        named = [*chosen, *([typed] if typed else [])]
        if not named:
            raise InputError("expected a run, or several; got none: choose of the list, or write the path of one")
        below = self._frame.access.runs
        desk.runs = RunsPage(tuple(chosen), typed, page_of([below / os.path.expanduser(name) for name in named]))

    def show(self, desk: Desk) -> list[Any]:
        if desk.runs is None:
            return [draw("nothing", _EMPTY)]
        version = hashlib.sha256(desk.runs.html.encode()).hexdigest()[:12]
        return [draw("framed", f"{ADDRESS}?{urlencode({'stack': desk.name, 'version': version})}")]

    def fill(self, desk: Desk) -> list[Any]:
        if desk.runs is None:
            return [gr.skip(), gr.skip()]
        chosen = list(desk.runs.chosen)
        return [gr.update(choices=_choices([], chosen), value=chosen), desk.runs.typed]


def _choices(runs: Sequence[Run], chosen: Sequence[str]) -> list[tuple[str, str]]:
    """What the list offers: the runs, and what is chosen though it is none of them."""
    lines = {str(run.path): run.line for run in runs}
    return [(line, path) for path, line in ({path: path for path in chosen} | lines).items()]


def page_of(folders: Sequence[Path]) -> str:
    """The page of one run, or of several side by side.

    Raises:
        InputError: one is no run, or they have nothing in common.
    """
    runs = {
        name: Results.load(folder) for name, folder in progress.each("reading the runs", name_runs(folders).items())
    }
    with progress.stage("writing the page"):
        return render_comparison(compare(runs)) if len(runs) > 1 else render_page(next(iter(runs.values())))
