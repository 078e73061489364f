"""Works of a page, whose thread is its own: what they say of themselves, and how they end."""

from __future__ import annotations

import threading
import warnings

import pytest

from reknow.errors import InputError
from reknow.progress import progress
from reknow.ui.work import Work, check_here, collect_warnings


def test_a_work_says_how_far_it_is_and_ends_at_its_next_step_when_it_is_cancelled():
    begun, go_on, left = threading.Event(), threading.Event(), []

    def task() -> None:
        try:
            with progress.stage("counting", 4, unit="sheep") as advance:
                advance(2)
                begun.set()
                assert go_on.wait(30)
                advance()
                left.append("it went on")
        finally:
            with progress.stage("tidying up"):  # what comes after is not ended too
                left.append("tidy")

    work = Work("dreaming", task)
    assert begun.wait(30) and work.running
    assert work.state.what == "dreaming: counting, 2 of 4 sheep" and work.state.share == 0.5
    work.cancel()
    go_on.set()
    assert work.wait(30) and work.cancelled and work.error is None and left == ["tidy"]


def test_a_step_without_progress_can_ask_whether_it_is_to_end():
    begun, go_on = threading.Event(), threading.Event()

    def task() -> None:
        begun.set()
        assert go_on.wait(30)
        check_here()
        raise InputError("it went on")

    work = Work("waiting", task)
    assert begun.wait(30)
    work.cancel()
    go_on.set()
    assert work.wait(30) and work.cancelled and work.error is None
    check_here()  # no work of this thread


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("expected a; got b: do c"), "expected a; got b: do c"),
        (ValueError("x"), "expected no failure here; got "),
    ],
)
def test_what_goes_wrong_is_a_sentence(error, said, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def task() -> None:
        raise error

    work = Work("failing", task)
    assert work.wait(30) and str(work.error).startswith(said) and not work.cancelled


def test_warnings_go_to_the_work_in_which_they_come(monkeypatch, recwarn):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        collect_warnings()
        work = Work("warning", lambda: warnings.warn("beware", stacklevel=1))
        assert work.wait(30) and work.warnings == ["beware"]
