"""The fourth screen: where the answer to a prompt sits, as a heat map whose cells can be asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from reknow.datasets.facts import load_facts
from reknow.errors import InputError
from reknow.report.heat_map import draw_trace
from reknow.report.trace_words import cell_sentence
from reknow.tracing.causal import Trace, embedding_std, trace_prompt
from reknow.ui.desks import Desk, Wish
from reknow.ui.drawing import draw
from reknow.ui.edit import EditScreen, read_edit
from reknow.ui.frame import Frame
from reknow.ui.work import applied

_EMPTY = "Nothing traced yet: write a prompt that the model answers, select its subject, and press “Trace”."
_ASK = "Click a cell to hear what it says, or go there with Tab and the arrow keys and press Enter."
_NOISE = "known_1000"
"""The set whose subjects say how strong the noise is, as `reknow trace` has it."""
_SCRIPT = (Path(__file__).parent / "where.js").read_text(encoding="utf-8")
_COPY = "(prompt, subject) => [prompt, subject]"


class Place(NamedTuple):
    """A cell of the map."""

    kind: str
    token: int
    layer: int


class Traced(NamedTuple):
    """What a desk traced last."""

    trace: Trace
    prompt: str
    subject: str
    """As the form has them."""
    patches: int
    """How many were on."""
    chosen: Place | None = None


class WhereScreen:
    """A prompt above, the heat map below, and what the cell says that was chosen."""

    def __init__(self, frame: Frame, edit: EditScreen):
        self._frame, self._edit = frame, edit
        with gr.Row(equal_height=True, elem_id="where-form"):
            self.prompt = gr.Textbox(
                label="Prompt",
                info="The model's own answer to it is followed. Mark the subject: select it with the mouse.",
                placeholder="The mother tongue of Danielle Darrieux is",
                max_lines=3,
                scale=4,
                min_width=280,
                elem_id="where-prompt",
            )
            self.subject = gr.Textbox(
                label="Subject",
                info="Noise is put on its tokens.",
                max_lines=1,
                scale=2,
                min_width=180,
                elem_id="where-subject",
            )
            self.go = gr.Button("Trace", variant="primary", scale=1, min_width=110, elem_id="trace")
        self.said = gr.HTML(elem_id="said", apply_default_css=False)
        with gr.Row(visible=False, elem_id="chosen") as self.chosen:
            self.cell = gr.HTML(elem_id="cell", apply_default_css=False)
            self.here = gr.Button("Edit here", elem_id="edit-here")
        self.map = gr.HTML(elem_id="map", apply_default_css=False, js_on_load=_SCRIPT)
        self.outputs = [self.cell, self.here, self.chosen, self.said, self.map]
        self.fields = [self.prompt, self.subject]
        self._connect()

    def _connect(self) -> None:
        frame, edit = self._frame, self._edit
        theirs = [edit.prompt, edit.subject]
        marked = frame.mark_subject(self.prompt, self.subject)
        for written in (self.prompt.input, self.subject.input, marked.then):
            written(None, self.fields, theirs, js=_COPY)
        frame.run(self.go.click, "tracing", self._trace, self.fields)
        frame.run(self.subject.submit, "tracing", self._trace, self.fields)
        frame.at_once(self.map.select, self._choose, [frame.name], [self.cell, self.here])
        begun = [edit.prompt, edit.subject, edit.layer, *self.fields, edit.more, frame.tabs]
        frame.at_once(self.here.click, self._begin_edit, [frame.name], begun)

    def take_prompt(self, tracing: gr.Tab) -> None:
        """The prompt and its subject come along when this screen is opened; what is written here goes to the first
        screen at once, so that it is there from wherever that one is opened."""
        tracing.select(None, [self._edit.prompt, self._edit.subject], self.fields, js=_COPY)

    # --- what happens ---------------------------------------------------------------------------------------

    def _trace(self, desk: Desk, prompt: str, subject: str) -> None:
        edit = read_edit(Wish(prompt, subject, target="?"))
        if edit.subject is None:
            raise InputError(
                "expected a subject, on which noise is put; got none: select it in the prompt with the mouse"
            )
        desk.wish = replace(desk.wish, prompt=prompt, subject=subject)
        with self._frame.models.using(desk.model) as lm, applied(lm, patches := desk.patches()):
            trace = trace_prompt(lm, edit.prompt, edit.subject, embedding_std(lm, load_facts(_NOISE)))
        desk.shown["where"] = Traced(trace, edit.text, edit.subject, len(patches))

    def _choose(self, name: str, event: gr.EventData) -> list[Any]:
        """What the cell says that was clicked."""
        desk = self._frame.desks.open(name)
        traced: Traced | None = desk.shown.get("where")
        if traced is None:
            return [gr.skip(), gr.skip()]
        chosen = Place(str(event.kind), int(event.token), int(event.layer))
        try:
            cell_sentence(traced.trace, *chosen)
        except InputError as error:  # of a map that is no longer the last one
            return [draw("cell", str(error)), gr.update(visible=False)]
        desk.shown["where"] = traced._replace(chosen=chosen)
        return self.show(desk)[:2]

    def _begin_edit(self, name: str) -> list[Any]:
        """Opens the form of an edit with what was traced and the layer that was chosen; the rest of it stays."""
        desk = self._frame.desks.open(name)
        traced: Traced | None = desk.shown.get("where")
        if traced is None or traced.chosen is None:
            return [gr.skip() for _ in range(7)]
        prompt, subject, layer = traced.prompt, traced.subject, str(traced.chosen.layer)
        desk.wish = replace(desk.wish, prompt=prompt, subject=subject, layer=layer)
        opened, selected = gr.update(open=True), gr.update(selected="edit")
        return [prompt, subject, layer, prompt, subject, opened, selected]

    # --- what is shown --------------------------------------------------------------------------------------

    def show(self, desk: Desk) -> list[Any]:
        traced: Traced | None = desk.shown.get("where")
        if traced is None:
            return ["", gr.skip(), gr.update(visible=False), draw("nothing", _EMPTY), ""]
        chosen, drawn = traced.chosen, draw_trace(traced.trace)
        said = cell_sentence(traced.trace, *chosen) if chosen is not None else _ASK
        here = gr.update(visible=chosen is not None, value=f"Edit at layer {chosen.layer}" if chosen else "")
        picture = draw("where", drawn, traced.patches, chosen)
        return [draw("cell", said), here, gr.update(visible=True), draw("lead", drawn.sentence), picture]

    def fill(self, desk: Desk) -> list[Any]:
        return [desk.wish.prompt or gr.skip(), desk.wish.subject or gr.skip()]
