"""The frame of the page: what is shown while a work goes on, and when it has ended."""

from __future__ import annotations

import threading
from pathlib import Path

import gradio as gr
import pytest

from reknow.errors import InputError
from reknow.ui.access import Access
from reknow.ui.desks import Desk, Desks
from reknow.ui.frame import Frame
from reknow.ui.work import Manner, check_here


class Shelf:
    """A screen that shows what lies on the desk under its name."""

    def __init__(self, name: str):
        self.name, self.outputs, self.fields = name, [gr.HTML()], []

    def show(self, desk: Desk) -> list[str]:
        return [desk.shown.get(self.name, "empty")]

    def fill(self, desk: Desk) -> list[str]:
        return []


def test_a_live_screen_shows_what_there_is_and_the_others_wait_until_the_end():
    desk, begun, go_on = Desk("desk", "demo:gpt2", Path("nowhere")), threading.Event(), threading.Event()
    with gr.Blocks():
        frame = Frame(None, None, Access())  # type: ignore[arg-type]
        frame.build_status()
        live, other = Shelf("live"), Shelf("other")
        frame.screens += [other, live]

    def task() -> None:
        desk.shown |= {"live": "a part", "other": "whole"}
        begun.set()
        assert go_on.wait(30)
        desk.shown["live"] = "whole"

    work = desk.start("writing", task, Manner("Well done.", live=live))
    assert begun.wait(30)
    one, another = frame.follow(desk, work), frame.follow(desk, work)  # as after a reload
    for following in (one, another):
        status, cancel, *shown = next(following)
        assert "writing" in status and cancel["visible"] and shown == [gr.skip(), "a part"]
    go_on.set()
    assert work.wait(30)
    for following in (one, another):
        status, cancel, *shown = list(following)[-1]
        assert "Well done." in status and not cancel["visible"] and shown == ["whole", "whole"]


def test_who_is_refused_since_another_tab_works_on_the_desk_sees_what_that_came_to():
    desks, go_on = Desks(Path("nowhere"), "demo:gpt2"), threading.Event()
    desk = desks.open("shared")
    with gr.Blocks():
        frame = Frame(desks, None, Access())  # type: ignore[arg-type]
        frame.build_status()
        frame.screens.append(Shelf("made"))

    def task() -> None:
        assert go_on.wait(30)
        desk.shown["made"] = "whole"

    desk.start("writing", task, Manner("Well done."))
    answers = frame._start("more", task, lambda _: Manner(), "shared")
    refused, waiting = next(answers), next(answers)
    assert "one work at a time" in refused[0] and waiting == [gr.skip()] * 3, "the sentence can be read meanwhile"
    go_on.set()
    status, cancel, made = list(answers)[-1]
    assert "Well done." in status and not cancel["visible"] and made == "whole"


def test_what_is_said_at_the_end_is_the_works_own():
    desk, go_on = Desk("desk", "demo:gpt2", Path("nowhere")), threading.Event()
    with gr.Blocks():
        frame = Frame(None, None, Access())  # type: ignore[arg-type]
        frame.build_status()

    def fail() -> None:
        assert go_on.wait(30)
        raise InputError("expected more; got less: give more")

    manner = Manner(lambda: "done", "Stopped by hand.")
    work = desk.start("failing", fail, manner)
    go_on.set()
    ended = list(frame.follow(desk, work))[-1]
    assert "expected more" in ended[0] and "done" not in ended[0]

    work = desk.start("waiting", work_until_cancelled, manner)
    work.cancel()
    ended = list(frame.follow(desk, work))[-1]
    assert "Stopped by hand." in ended[0] and "done" not in ended[0]
    assert "done" in list(frame.follow(desk, desk.start("nothing", lambda: None, manner)))[-1][0]


def work_until_cancelled() -> None:
    while True:
        check_here()


@pytest.mark.parametrize("values", [("runs/a\0b",), (["a", "b\0"], "x")])
def test_a_field_with_the_character_that_ends_texts_is_refused(values):
    desks = Desks(Path("nowhere"), "demo:gpt2")
    with gr.Blocks():
        frame = Frame(desks, None, Access())  # type: ignore[arg-type]
        frame.build_status()
    (shown,) = list(frame._start("reading", lambda *_: pytest.fail("it ran"), lambda _: Manner(), "desk", *values))
    assert "expected texts without the character U+0000" in shown[0]
