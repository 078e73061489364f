"""The models of the page: one work at a time, in the order in which they came, and a few of them in memory."""

from __future__ import annotations

import threading

import pytest

from reknow.errors import ModelError
from reknow.ui.models import Models
from reknow.ui.work import Work


def test_works_take_turns_and_one_that_waits_can_be_cancelled():
    models, done, go_on = Models(lambda name: name), [], threading.Event()  # type: ignore[arg-type, return-value]
    inside = threading.Event()

    def work(name: str) -> None:
        with models.using("model"):
            inside.set()
            assert go_on.wait(30)
            done.append(name)

    first = Work("first", lambda: work("first"))
    assert inside.wait(30)
    second, third = (Work(name, lambda name=name: work(name)) for name in ("second", "third"))
    while "waiting for the work of another page" not in second.state.what:
        assert second.running
    second.cancel()
    assert second.wait(30) and second.cancelled
    go_on.set()
    assert first.wait(30) and third.wait(30) and done == ["first", "third"]


def test_the_last_used_models_are_kept():
    opened: list[str] = []

    def open_model(name: str):
        if name == "none":
            raise ModelError("there is none")
        opened.append(name)
        return name

    models = Models(open_model, most=2)
    for name in ("a", "b", "a", "c", "a", "b"):
        with models.using(name) as model:
            assert model == name
    assert opened == ["a", "b", "c", "b"]
    with pytest.raises(ModelError), models.using("none"):
        pass
    with models.using("a"):
        pass
