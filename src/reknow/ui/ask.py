"""The screen on which both models are asked, without a tab's patches and with them, side by side."""

from __future__ import annotations

from typing import Any

import gradio as gr

from reknow.ui.desks import Desk
from reknow.ui.drawing import draw
from reknow.ui.frame import Frame
from reknow.ui.talk import Settings, Talk
from reknow.ui.work import work_here

_EMPTY = (
    "Nothing asked yet. A model with a chat template talks with you; any other one continues your text, each "
    "question by itself. The words in which the two answers differ are marked."
)
_STOPPED = "Stopped: what was written so far stays."
_FOLLOW = """
let low = true;
window.addEventListener('scroll', () => {
  low = window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 300;
}, {passive: true});
watch('value', () => requestAnimationFrame(() => {
  const shown = element.offsetParent && element.textContent.trim();
  if (low && shown) window.scrollTo(0, document.documentElement.scrollHeight);
}));
"""
"""Who is at the end of the conversation stays there while it grows."""


class AskScreen:
    """The conversation, and below it what is asked next."""

    def __init__(self, frame: Frame):
        self._frame = frame
        self.past = gr.HTML(elem_id="asked", apply_default_css=False)
        self.now = gr.HTML(elem_id="answering", apply_default_css=False, js_on_load=_FOLLOW)
        with gr.Row(elem_id="asking"):
            self.question = gr.Textbox(
                "", label="Ask both", placeholder="The mother tongue of Danielle Darrieux is", lines=1, max_lines=5,
                elem_id="question", scale=5, min_width=300,
            )  # fmt: skip
            self.go = gr.Button("Ask", variant="primary", elem_id="ask", scale=0, min_width=100)
            self.new = gr.Button("New conversation", elem_id="new", scale=0, min_width=210)
        with gr.Accordion("How answers are written", open=False, elem_id="writing"), gr.Row():
            self._build_settings()
        self._asked = gr.State("")
        self.outputs = [self.past, self.now, self.question]
        self.fields = [self.tokens, self.temperature, self.top_k, self.seed, self.template]
        self._connect()

    def _build_settings(self) -> None:
        plain = Settings()

        def number(value: float, label: str, info: str, precision: int | None = 0) -> gr.Number:
            name = label.lower()
            return gr.Number(value, label=label, info=info, precision=precision, min_width=130, elem_id=name)

        self.tokens = number(
            plain.tokens, "Tokens", f"At most; 0: {plain.most(False)}, or {plain.most(True)} to talk."
        )
        self.temperature = number(plain.temperature, "Temperature", "0: the likeliest tokens.", None)
        self.top_k = number(plain.top_k, "Top-k", "Drawn among so many; 0: all.")
        self.seed = number(plain.seed, "Seed", "The same for both.")
        self.template = gr.Checkbox(
            plain.template, label="In the chat template", info="Where the model has one.", min_width=200,
            elem_id="template",
        )  # fmt: skip

    def _connect(self) -> None:
        frame = self._frame
        for event in (self.go.click, self.question.submit):
            taken = event(
                self._take,
                [frame.name, self.question],
                [self._asked, self.question],
                queue=False,
                show_progress="hidden",
            )
            frame.run(taken.then, "asking", self._ask, [self._asked, *self.fields], stopped=_STOPPED, live=self)
        frame.run(self.new.click, "beginning a new conversation", self._begin_afresh)

    # --- what happens ---------------------------------------------------------------------------------------

    def _take(self, name: str, question: str) -> list[Any]:
        """The question leaves the box at once, so that the next one can be written; not where it has to wait."""
        return [question, gr.skip() if self._frame.desks.open(name).busy else ""]

    def _ask(self, desk: Desk, question: str, tokens, temperature, top_k, seed, template) -> None:
        talk = _talk(desk)
        talk.back = work_here(), question
        talk.settings = Settings(tokens, temperature, top_k, seed, template)
        with self._frame.models.using(desk.model) as lm:
            talk.ask(lm, desk.patches(), question, talk.settings)
        talk.back = None

    def _begin_afresh(self, desk: Desk) -> None:
        desk.shown["ask"] = Talk(settings=_talk(desk).settings)

    # --- what is shown --------------------------------------------------------------------------------------

    def show(self, desk: Desk) -> list[Any]:
        talk = _talk(desk)
        past = draw("turns", desk.model, talk.turns, file="ask.html") if talk.turns else ""
        now = draw("turn", talk.now, True, file="ask.html") if talk.now is not None else ""
        back = gr.skip()
        if talk.back is not None and talk.back[0] is desk.work and not desk.busy:
            back = talk.back[1]
        return [past or ("" if now else draw("nothing", _EMPTY)), now, back]

    def fill(self, desk: Desk) -> list[Any]:
        settings = _talk(desk).settings
        if settings == Settings():
            return [gr.skip() for _ in self.fields]
        return [settings.tokens, settings.temperature, settings.top_k, settings.seed, settings.template]


def _talk(desk: Desk) -> Talk:
    return desk.shown.setdefault("ask", Talk())
