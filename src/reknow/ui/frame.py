"""What all screens stand in: whose tab it is, how far its work is, and what is shown when it has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import gradio as gr

from reknow.errors import InputError, ReknowError
from reknow.ui.access import Access
from reknow.ui.desks import Desk, Desks
from reknow.ui.drawing import draw, draw_end, draw_state
from reknow.ui.models import Models
from reknow.ui.work import PLAIN, Manner, Work

_LOOK = 0.15
"""Seconds between two looks at a work."""


_MARK = """
(subject) => {
  const box = document.querySelector("PROMPT textarea, PROMPT input");
  const chosen = box.value.slice(box.selectionStart, box.selectionEnd).trim();
  return chosen && chosen !== box.value.trim() ? chosen : subject;
}
"""


class Screen(Protocol):
    """A tab of the page."""

    outputs: list[Any]
    """The components that show what was made."""
    fields: list[Any]
    """Those in which a person writes: they are filled in when a page is loaded, and left alone afterwards."""

    def show(self, desk: Desk) -> list[Any]:
        """A value, or an update, for each of the outputs."""
        ...

    def fill(self, desk: Desk) -> list[Any]:
        """Likewise for the fields."""
        ...


class Frame:
    """The parts that every screen has.

    Attributes:
        access: what those may reach who open the page.
        name: the name of the tab's desk.
        screens: in their order; the head of the page is one too.
    """

    def __init__(self, desks: Desks, models: Models, access: Access):
        self.desks, self.models, self.access = desks, models, access
        self.screens: list[Screen] = []
        self.tabs: Any = None
        self._runs: list[Callable[[], object]] = []
        self.name = gr.Textbox("", elem_id="desk-name", show_label=False, container=False)

    def build_status(self) -> None:
        """Where works are told of, with the button that ends them."""
        with gr.Row(elem_id="status-row"):
            self.status = gr.HTML(elem_id="status", apply_default_css=False, scale=5)
            self.cancel = gr.Button("Cancel", visible=False, elem_id="cancel", scale=0, min_width=110)
        self.at_once(self.cancel.click, self._cancel, [self.name], None)

    def _cancel(self, name: str) -> None:
        work = self.desks.open(name).work
        if work is not None:
            work.cancel()

    @property
    def outputs(self) -> list[Any]:
        """What a work may change: all that screens show."""
        return [self.status, self.cancel, *(one for screen in self.screens for one in screen.outputs)]

    def run(
        self,
        event: Callable[..., Any],
        what: str,
        task: Callable[..., object],
        inputs: Sequence[Any] = (),
        done: str | Callable[[Desk], str] = "",
        *,
        stopped: str = PLAIN.stopped,
        live: Screen | None = None,
        emptied: Any = None,
        with_data: bool = False,
    ) -> None:
        """When the event comes, does `task(desk, *inputs)` in a thread, shows how far it is, and then all screens.

        Args:
            event: such as a click of a button. What the task raises is told in a sentence.
            done: what is said when it went well.
            stopped: what is said when it was cancelled.
            live: a screen that is shown meanwhile too, since the task leaves there what it has so far.
            emptied: a field, among the outputs of its screen, that is emptied when it went well.
            with_data: whether the task is called as `task(desk, data, *inputs)`, with what the event's sender says.
        """

        def manner(desk: Desk) -> Manner:
            return Manner(done if isinstance(done, str) else partial(done, desk), stopped, live, emptied)

        def start(name: str, *values: Any) -> Iterator[list[Any]]:
            yield from self._start(what, task, manner, name, *values)

        def start_with_data(sent: gr.EventData, name: str, *values: Any) -> Iterator[list[Any]]:
            yield from self._start(what, task, manner, name, sent._data, *values)

        started = start_with_data if with_data else start
        limit = {"concurrency_limit": self.access.works, "concurrency_id": "works"}
        self._runs.append(lambda: event(started, [self.name, *inputs], self.outputs, show_progress="hidden", **limit))

    def at_once(self, event: Callable[..., Any], answer: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
        """When the event comes, answers it with what takes no time; more may follow on what is given. Not through the
        queue: where two answers cross, gradio's client closes the stream on which the second one is to come."""
        return event(answer, inputs, outputs, queue=False, show_progress="hidden")

    def mark_subject(self, prompt: gr.Textbox, subject: gr.Textbox) -> Any:
        """What is selected in the prompt becomes the subject, but nothing and all of it; in the browser, since a
        selection grows letter by letter under the keyboard and the server would miss some."""
        script = _MARK.replace("PROMPT", f"#{prompt.elem_id}")
        return prompt.select(None, [subject], [subject], js=script)

    def connect(self) -> None:
        """Binds the events, when all screens are there, since each may change what any of them shows."""
        for bind in self._runs:
            bind()

    def _start(
        self, what: str, task: Callable[..., object], manner: Callable[[Desk], Manner], name: str, *values: Any
    ) -> Iterator[list[Any]]:
        desk = self.desks.open(name)
        try:
            _check_texts(values)
            work = desk.start(what, partial(task, desk, *values), manner(desk))
        except ReknowError as error:
            yield self._updates(desk, draw("message", str(error), [], ""))
            work = desk.work  # it may be another tab's of this address, which nobody follows here
            while work is not None and not work.wait(_LOOK):
                yield [gr.skip() for _ in self.outputs]
        if work is not None:
            yield from self.follow(desk, work)

    def follow(self, desk: Desk, work: Work) -> Iterator[list[Any]]:
        """Values of the outputs while the work goes on and when it has ended."""
        while not work.wait(_LOOK):
            yield self._updates(desk, draw_state(work.state), work.manner.live)
        emptied = work.manner.emptied if work.went_well else None
        shown = [draw_end(work), gr.update(visible=False), *self.shown(desk)]
        yield ["" if one is emptied else value for one, value in zip(self.outputs, shown, strict=True)]

    def shown(self, desk: Desk) -> list[Any]:
        """What all screens show of the desk."""
        return [value for screen in self.screens for value in screen.show(desk)]

    def _updates(self, desk: Desk, status: str, live: object = None) -> list[Any]:
        """The status while a work goes on, and what the live screen shows; the other screens stay as they are."""
        values: list[Any] = [status, gr.update(visible=True)]
        for screen in self.screens:
            values += screen.show(desk) if screen is live else [gr.skip() for _ in screen.outputs]
        return values


def _check_texts(values: Sequence[Any]) -> None:
    """Raises InputError where a field has the character that ends texts for the machine, as no keyboard gives it."""
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    if any(isinstance(text, str) and "\0" in text for text in texts):
        raise InputError("expected texts without the character U+0000; a field has one: write it anew")
