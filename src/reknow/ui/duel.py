"""Two methods on one fact: each is tried by itself, and their answers stand side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from reknow.contract import check_edits
from reknow.edits import Edit
from reknow.errors import InputError
from reknow.evaluation.tried import Tried, try_edits
from reknow.registry import METHODS
from reknow.ui.desks import Desk, Wish
from reknow.ui.drawing import draw
from reknow.ui.edit import EditScreen, read_edit, reworded
from reknow.ui.frame import Frame
from reknow.ui.suggestions import build
from reknow.ui.work import applied

_EMPTY = "Nothing compared yet: write a request, or take what stands in “Edit”, and choose two methods."
_STOPPED = "Cancelled: what was tried until then is shown; the model and the stack are as before."
_FIRST, _SECOND = "rome", "ft-m"


@dataclass
class Match:
    """An edit that two methods are tried on, on the model with the tab's patches."""

    wish: Wish
    methods: tuple[str, str] = (_FIRST, _SECOND)
    edit: Edit | None = None
    trials: list[Tried] = field(default_factory=list)
    """Those that are done."""


class Duel:
    """The request and two lists of methods, and below them what each did. It stands in any container.

    Args:
        edit: the screen whose request can be taken over.
    """

    def __init__(self, frame: Frame, edit: EditScreen):
        self._frame = frame
        with gr.Row(equal_height=True):
            self.prompt = self._text("Request", "The mother tongue of Danielle Darrieux is", "prompt", 3)
            self.subject = self._text("Subject", "Danielle Darrieux", "subject")
            self.target = self._text("New answer", "English", "target")
        with gr.Row(elem_id="duel-row"):
            names = list(METHODS)
            self.first = gr.Dropdown(names, value=_FIRST, label="One method", min_width=160, elem_id="duel-first")
            self.second = gr.Dropdown(names, value=_SECOND, label="Another", min_width=160, elem_id="duel-second")
            self.take = gr.Button("Take what stands in “Edit”", scale=0, min_width=290, elem_id="duel-take")
            self.go = gr.Button("Try both", variant="primary", scale=0, min_width=130, elem_id="duel-go")
        self.result = gr.HTML(elem_id="duel", apply_default_css=False)
        request = [self.prompt, self.subject, self.target]
        self.outputs, self.fields = [self.result], [*request, self.first, self.second]
        frame.at_once(self.take.click, lambda *texts: list(texts), [edit.prompt, edit.subject, edit.target], request)
        frame.run(self.go.click, "trying two methods", self._try, self.fields, stopped=_STOPPED, live=self)

    def _text(self, label: str, example: str, name: str, scale: int = 1) -> gr.Textbox:
        width, name = 300 if scale > 1 else 160, f"duel-{name}"
        return gr.Textbox(
            "", label=label, placeholder=example, max_lines=3, scale=scale, min_width=width, elem_id=name
        )

    def _try(self, desk: Desk, prompt: str, subject: str, target: str, first: str, second: str) -> None:
        desk.shown["duel"] = match = Match(Wish(prompt, subject, target, case=desk.wish.case), (first, second))
        edit = read_edit(match.wish)
        if not (first and second) or first == second:
            raise InputError(f"expected two methods; got {first or 'none'} and {second or 'none'}: choose two")
        methods = [build(name) for name in match.methods]
        for method in methods:
            check_edits(method, [edit])
        match.edit = edit
        with self._frame.models.using(desk.model) as lm, applied(lm, desk.patches()):
            for method in methods:
                match.trials.append(try_edits(lm, method.resolve(lm), [edit], reworded(match.wish, edit)))

    # --- what is shown --------------------------------------------------------------------------------------

    def show(self, desk: Desk) -> list[Any]:
        match: Match | None = desk.shown.get("duel")
        if match is None or not match.trials:
            return [draw("nothing", _EMPTY if match is None else "No result yet.")]
        return [draw("tried", match.edit, match.trials[0].before, match.trials)]

    def fill(self, desk: Desk) -> list[Any]:
        match: Match | None = desk.shown.get("duel")
        if match is None:
            return [gr.skip() for _ in self.fields]
        return [match.wish.prompt, match.wish.subject, match.wish.target, *match.methods]
