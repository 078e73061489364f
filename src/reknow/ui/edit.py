"""The first screen: a request, a method, and what the edit did and did not do; kept, it goes on the stack."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import gradio as gr

from reknow.contract import check_edits
from reknow.datasets.cases import load_cases
from reknow.edits import Case, Edit
from reknow.errors import InputError
from reknow.evaluation.tried import try_edits
from reknow.texts.templates import fill
from reknow.texts.writing import clip
from reknow.ui.desks import Desk, Wish, put_on
from reknow.ui.drawing import draw
from reknow.ui.frame import Frame
from reknow.ui.suggestions import build, others, suggest
from reknow.ui.work import applied

_SETS = ("counterfact", "zsre", "wiki_recent", "wiki_counterfact", "qaedit")
"""Bundled sets whose answers are short."""
_REWORDED = 3
"""In how many other words a request is asked."""
_EMPTY = "Nothing tried yet: write a request, or take one from a bundled set, and press “Try the edit”."


@cache
def bundled(name: str) -> list[Case]:
    """The cases of a bundled set."""
    return load_cases(name)


class EditScreen:
    """Request and method on one side, what the edit did on the other."""

    def __init__(self, frame: Frame):
        self._frame = frame
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=340):
                self._build_form()
            with gr.Column(scale=3, min_width=340):
                self.result = gr.HTML(elem_id="tried", apply_default_css=False)
                with gr.Row(visible=False, elem_id="keeping") as self.keeping:
                    self.why = gr.Textbox("", label="Why (for the history)", max_lines=1, scale=4, elem_id="why")
                    self.keep = gr.Button("Keep this patch", variant="primary", scale=1, elem_id="keep")
        self.outputs = [self.result, self.keeping, self.why]
        self.fields = [self.prompt, self.subject, self.target, self.true, self.suggested, self.other, self.layer]
        self._connect()

    def _build_form(self) -> None:
        with gr.Accordion("Take a fact from a bundled set", open=False, elem_id="facts"):
            self.set = gr.Dropdown(list(_SETS), label="Set", value=None, elem_id="set")
            self.fact = gr.Dropdown([], label="Fact", value=None, filterable=True, elem_id="fact")
        self.prompt = gr.Textbox(
            "",
            label="Request",
            info="What the model shall continue. Mark the subject: select it with the mouse.",
            placeholder="The mother tongue of Danielle Darrieux is",
            lines=2,
            elem_id="prompt",
        )
        self.subject = gr.Textbox(
            "", label="Subject", info="The entity that the fact is about; a question may have none.", max_lines=1,
            elem_id="subject",
        )  # fmt: skip
        self.target = gr.Textbox("", label="New answer", placeholder="English", max_lines=1, elem_id="target")
        offered = suggest(True)
        self.suggested = gr.Radio(
            [(one.label, one.method) for one in offered], value="rome", label="Method", elem_id="suggested"
        )
        with gr.Accordion("Other methods, layer, old answer", open=False, elem_id="more") as self.more:
            self.other = gr.Dropdown(["", *others(True)], value="", label="Another method", elem_id="other")
            self.layer = gr.Textbox(
                "",
                label="Layer",
                info="Empty: the method's own choice. 3,4,5: for those that edit at several.",
                max_lines=1,
                elem_id="layer",
            )
            self.true = gr.Textbox("", label="Present answer", info="To follow its probability.", elem_id="true")
        self.go = gr.Button("Try the edit", variant="primary", elem_id="go")

    def _connect(self) -> None:
        frame = self._frame
        frame.at_once(self.set.change, self._list_facts, [self.set], [self.fact])
        frame.at_once(self.fact.input, self._take_fact, [frame.name, self.set, self.fact], self.fields)
        frame.mark_subject(self.prompt, self.subject)
        self.offered = gr.State(True)  # whether methods are offered that need a subject
        for event in (self.subject.change, self.target.focus):
            frame.at_once(
                event,
                self._offer,
                [self.prompt, self.subject, self.offered, self.suggested],
                [self.offered, self.suggested, self.other],
            )
        inputs = [self.prompt, self.subject, self.target, self.true, self.suggested, self.other, self.layer]
        frame.run(self.go.click, "trying the edit", self._try, inputs)
        frame.run(self.target.submit, "trying the edit", self._try, inputs)
        kept = "Kept: it is on the stack now."
        frame.run(self.keep.click, "keeping the patch", self._keep, [self.why], kept, emptied=self.why)

    # --- what happens ---------------------------------------------------------------------------------------

    def _list_facts(self, name: str | None) -> Any:
        cases = bundled(name) if name else []
        choices = [(_told(case.edit), number) for number, case in enumerate(cases)]
        return gr.update(choices=choices, value=None)

    def _take_fact(self, name: str, data_set: str, number: int | None) -> list[Any]:
        desk = self._frame.desks.open(name)
        if number is None:
            return [gr.skip() for _ in self.fields]
        case = bundled(data_set)[number]
        edit = case.edit
        desk.wish = replace(
            desk.wish, prompt=edit.text, subject=edit.subject or "", target=edit.target_new,
            true=edit.target_true or "", case=case,
        )  # fmt: skip
        return self.fill(desk)

    def _offer(self, prompt: str, subject: str, offered: bool, suggested: str | None) -> list[Any]:
        """Other methods, where there is a subject now and was none, or none any more; who took the first one that was
        suggested before gets the first one now."""
        marked = _marked(prompt, subject)
        if marked == offered:
            return [gr.skip()] * 3
        first = suggested == suggest(offered)[0].method
        return [marked, *_choices(marked, "" if first else suggested or "")]

    def _try(self, desk: Desk, prompt, subject, target, true, suggested, other, layer) -> None:
        case = desk.wish.case
        desk.wish = wish = Wish(prompt, subject, target, true, other or suggested, layer, case)
        edit = read_edit(wish)
        method = build(wish.method, layer)
        check_edits(method, [edit])
        with self._frame.models.using(desk.model) as lm, applied(lm, desk.patches()):
            desk.tried = try_edits(lm, method.resolve(lm), [edit], reworded(wish, edit))
        desk.shown["answered"] = wish

    def _keep(self, desk: Desk, why: str) -> None:
        tried = desk.tried
        if tried is None:
            raise InputError("expected an edit that was tried; got none: try one first")
        with self._frame.models.using(desk.model) as lm:
            desk.change(lm, "apply", lambda stack: put_on([tried.patch], lm, stack), why.strip())
        desk.tried = None
        desk.shown["kept"] = tried

    # --- what is shown --------------------------------------------------------------------------------------

    def show(self, desk: Desk) -> list[Any]:
        tried = desk.tried or desk.shown.get("kept")
        if tried is None:
            return [draw("nothing", _EMPTY), gr.update(visible=False), gr.skip()]
        edit = tried.patch.edits[0]
        drawn = draw("tried", edit, tried.before, [tried])
        if desk.shown.get("answered") != desk.wish:  # it was refused or cancelled
            drawn = draw("before", edit, tried.patch.method) + drawn
        return [drawn, gr.update(visible=desk.tried is not None), gr.skip()]

    def fill(self, desk: Desk) -> list[Any]:
        wish = desk.wish
        if wish == Wish():  # nothing to bring back, and a person may be writing already
            return [gr.skip() for _ in self.fields]
        return [
            wish.prompt,
            wish.subject,
            wish.target,
            wish.true,
            *_choices(_marked(wish.prompt, wish.subject), wish.method),
            wish.layer,
        ]


def _choices(marked: bool, method: str) -> list[Any]:
    """What the two lists of methods offer, with the method chosen, or else the first one that is suggested."""
    offered, rest = suggest(marked), others(marked)
    names = [one.method for one in offered]
    return [
        gr.update(
            choices=[(one.label, one.method) for one in offered], value=method if method in names else names[0]
        ),
        gr.update(choices=["", *rest], value=method if method in rest else ""),
    ]


def _marked(prompt: str, subject: str) -> bool:
    """Whether methods that need a subject are offered: there is one, or nothing is written yet."""
    return bool(subject.strip()) or "{" in prompt or not prompt.strip()


def reworded(wish: Wish, edit: Edit) -> list[str]:
    """The request in other words, where it comes from a set that has it so."""
    if wish.case is None or wish.case.edit != edit:
        return []
    return [probe.prompt for probe in wish.case.probes if probe.kind == "generalization"][:_REWORDED]


def read_edit(wish: Wish) -> Edit:
    """The edit that the form asks for; of a bundled case the edit with all that it has.

    Raises:
        InputError: a field is empty, or the subject is not in the prompt.
    """
    prompt, subject, target = wish.prompt.strip(), wish.subject.strip(), wish.target.strip()
    if not prompt or not target:
        missing = "a request" if not prompt else "a new answer"
        raise InputError(f"expected {missing}; got none: write it, or take a fact from a bundled set")
    if wish.case is not None:
        edit = wish.case.edit
        if (edit.text, edit.subject or "", edit.target_new) == (prompt, subject, target):
            return edit
    true = wish.true.strip() or None
    if "{" in prompt and not subject:
        return Edit.parse(prompt, target, target_true=true)
    if not subject:
        return Edit(prompt, target_new=target, target_true=true)
    if subject not in prompt and "{}" not in prompt:
        raise InputError(
            f"expected the subject “{subject}” in the request; got {prompt!r}: select it there with the mouse"
        )
    return Edit(prompt, subject=subject, target_new=target, target_true=true)


def _told(edit: Edit) -> str:
    """A fact in a line of a list."""
    old = f"{edit.target_true} → " if edit.target_true else ""
    return f"{clip(fill(edit.prompt, edit.subject), 20)} … {old}{clip(edit.target_new, 8)}"
