"""The head of the page: which model, which stack, and what is on it."""

from __future__ import annotations

import os
from typing import Any

import gradio as gr

from reknow.errors import ReknowError
from reknow.patching.stack import base_name
from reknow.ui.desks import Desk
from reknow.ui.drawing import draw
from reknow.ui.frame import Frame
from reknow.ui.kept import count_kept


class Head:
    """Title, model, and the state of the stack."""

    def __init__(self, frame: Frame, models: list[str]):
        self._frame, free = frame, frame.access.machine
        with gr.Row(elem_id="head"):
            gr.HTML(
                draw("title"),
                elem_id="title",
                apply_default_css=False,
            )
            self.model = gr.Dropdown(
                models,
                label="Model",
                info="A demo, a folder, a GGUF file or a name on the hub." if free else None,
                allow_custom_value=free,
                elem_id="model",
            )
            self.stack = gr.HTML(elem_id="stack-line", apply_default_css=False)
        self.outputs: list[Any] = [self.stack, self.model]  # a model that did not open does not stay in its field
        self.fields: list[Any] = []
        frame.run(self.model.input, "opening the model", self._take, [self.model])

    def _take(self, desk: Desk, model: str | None) -> None:
        wanted = os.path.expanduser((model or "").strip())
        if not wanted or base_name(wanted) == desk.model:
            return
        with self._frame.models.using(wanted):  # it opens, or this is the end of it
            self._frame.desks.take(desk, wanted)

    def show(self, desk: Desk) -> list[Any]:
        try:
            return [draw("stack_line", desk.name, desk.model, count_kept(desk.folder)), desk.model]
        except ReknowError as error:
            return [draw("message", str(error), [], ""), desk.model]

    def fill(self, desk: Desk) -> list[Any]:
        return []
