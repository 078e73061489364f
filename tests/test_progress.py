"""How far a long work is: stages, estimates, and what a terminal, a pipe and a program see of them."""

from __future__ import annotations

import gc
import io
import logging
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from functools import partial

import pytest

from conftest import bits, make_lm, same, saved, some_patch
from reknow import LM, Edit, display, method
from reknow.cli.terminal import LogHandler, say
from reknow.display import Display, duration
from reknow.editing.covariance import statistics
from reknow.progress import _here, progress


class Clock:
    """A clock that stands still until it is told the time."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(display, "clock", found := Clock())
    monkeypatch.setattr(display, "REFRESH", 3600.0)  # no timer: tests say when it is time
    monkeypatch.setenv("REKNOW_PROGRESS", "1")
    return found


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@contextmanager
def piped(what: str):
    """Gives a pipe and the display that writes into it, while there is a stage."""
    pipe = io.StringIO()
    with Display(pipe) as shown, progress.reported_to(shown.hear), progress.stage(what):
        yield pipe, shown


@pytest.fixture
def heard():
    """Every report as text."""
    texts: list[str] = []
    with progress.reported_to(lambda stage: texts.append(str(stage))):
        yield texts


# --- stages ----------------------------------------------------------------------------------------------------


def test_a_stage_reports_how_far_it_is(heard):
    with progress.stage("trying layers", 2) as advance:
        for _ in progress.each("learning", range(2), unit="passes"):
            progress.note("loss 0.25")
        advance()
        with progress.stage("reading", 1000) as inner:
            inner(600)
        advance()
    assert heard == [
        "trying layers, 0 of 2",
        "trying layers, 0 of 2: learning, 0 of 2 passes",
        "trying layers, 0 of 2: learning, 1 of 2 passes, loss 0.25",
        "trying layers, 0 of 2: learning, 2 of 2 passes, loss 0.25",
        "trying layers, 0 of 2",
        "trying layers, 1 of 2",
        "trying layers, 1 of 2: reading, 0 of 1,000",
        "trying layers, 1 of 2: reading, 600 of 1,000",
        "trying layers, 1 of 2: reading, 1,000 of 1,000",
        "trying layers, 1 of 2",
        "trying layers, 2 of 2",
    ]


def test_what_is_one_part_names_only_what_is_in_it(heard):
    for _ in progress.each("searching", [0]):
        with progress.stage("rome"), progress.stage("rome"), progress.stage("finding values", 3):
            pass
    assert heard[0] == "searching" and "rome: finding values, 3 of 3" in heard
    assert not [text for text in heard if "rome: rome" in text or "searching: " in text]


@pytest.mark.parametrize(
    "last", [pytest.param(last, marks=[pytest.mark.slow] * (last % 4 > 0)) for last in range(40)]
)
def test_an_interrupt_in_any_line_of_a_stage_leaves_none_open(last):
    lines = iter(range(last))

    def trace(frame, event, arg):
        if frame.f_code.co_filename == progress_file and event == "line" and next(lines, None) is None:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    progress_file = sys.modules["reknow.progress"].__file__
    with suppress(KeyboardInterrupt):
        try:
            sys.settrace(trace)
            with progress.stage("outer", 2), progress.stage("inner"):
                pass
        finally:
            sys.settrace(None)
    gc.collect()
    assert _here.stage is None and _here.listener is None


def test_a_loop_that_is_left_has_ended(heard):
    for number in progress.each("learning", range(5)):
        if number == 1:
            break
    with pytest.raises(ZeroDivisionError):
        for number in progress.each("learning", range(5)):
            1 / number
    with progress.stage("next"):
        assert heard[-1] == "next"


def test_what_an_error_keeps_of_a_loop_does_no_harm(heard):
    """The error keeps the loop as it was until it is forgotten, in no order, and then also within other work."""

    def broken():
        numbers = progress.each("broken", range(3))
        for number in numbers:
            [1 / number for number in progress.each("reading", [number])]

    kept, stages = [], []
    for i in range(2000):
        try:
            with progress.stage("edit"):
                broken()
        except ZeroDivisionError as error:
            kept.append((error, kept if i % 3 else None))  # in circles too
        kept = kept[i % 7 :]
    with progress.stage("next"), progress.reported_to(stages.append), progress.stage("inside", 2) as advance:
        kept.clear()
        gc.collect()
        advance()
    assert [stage.what for stage in stages[0].chain] == ["next", "inside"] and _here.stage is None
    for _ in range(2000):  # not within anything
        with suppress(ZeroDivisionError):
            broken()
    gc.collect()
    assert _here.stage is None


def test_time_left_counts_what_works_inside_have_done(clock):
    stages = []
    with (
        progress.reported_to(lambda stage: stages.append(stage)),
        progress.stage("cases", 10) as advance,
        progress.stage("learning", 20, parts=1) as step,
    ):
        case = stages[0]
        for _ in range(10):
            clock.now += 1
            step()
        assert case.share == pytest.approx(0.05) and case.left == pytest.approx(190)
        step(10)
        assert case.share == pytest.approx(0.1)
        advance()
        assert case.share == pytest.approx(0.1), "the part that was done inside counts once"


def test_an_estimate_waits_for_a_second_follows_the_pace_and_is_never_negative(clock):
    stages = []
    with progress.reported_to(lambda stage: stages.append(stage)), progress.stage("tokens", 1000) as advance:
        stage = stages[0]
        assert stage.left is None
        clock.now += 0.5
        advance(10)
        assert stage.left is None, "too early to tell"
        clock.now += 0.5
        advance(10)
        assert stage.left == pytest.approx(49)
        clock.now += 9
        assert stage.left == pytest.approx(40), "it counts down between two parts"
        clock.now += 60
        assert stage.left is None, "later than was foreseen"
        for _ in range(40):
            clock.now += 1
            advance(20)
        assert stage.left == pytest.approx((1000 - 820) / 20, rel=0.5), "the long pause is forgotten"


def test_work_that_was_done_before_does_not_count_for_the_pace(clock):
    stages = []
    with progress.reported_to(lambda stage: stages.append(stage)), progress.stage("cases", 100, done=90) as advance:
        clock.now += 10
        advance(5)
        assert stages[0].left == pytest.approx(10) and stages[0].share == pytest.approx(0.95)


def test_the_library_reports_what_takes_long(tmp_path, heard):
    lm, text = make_lm(), tmp_path / "text.txt"
    text.write_text("The mother tongue of Peru is Spanish.\n\n" * 40)
    statistics(lm, [1], tokens=150, text=str(text))
    written = dict(context_source="model", context_groups=((2, 3), (2, 4)))
    method("rome", layer=1, steps=2, turns=1, covariance_tokens=0, **written).edit(
        lm, [Edit("The capital of {} is", subject="Peru", target_new="Rome")]
    )
    assert any("statistics, 150 of 150 tokens" in line for line in heard), heard
    for n in range(3):
        assert f"rome: writing contexts, {n} of 2 groups" in heard
    assert any("2 of 2 passes, loss" in line for line in heard)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of loops that are left by it
@pytest.mark.parametrize("reports", [1, 2, 4, 8])
def test_a_listener_that_ends_the_work_leaves_the_model_as_it_was(reports):
    lm, left = make_lm(), [reports]
    before, patch = bits(lm), some_patch(lm)

    def end(_stage) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise EOFError

    with pytest.raises(EOFError), progress.reported_to(end), lm.patched(patch):
        method("rome", layer=1, steps=3, covariance_tokens=0).edit(
            lm, [Edit("The capital of {} is", subject="Peru", target_new="Rome")]
        )
    assert same(bits(lm), before) and lm.patches == () and _here.stage is None


# --- where stderr is no terminal -------------------------------------------------------------------------------


def test_without_a_terminal_lines_come_now_and_then(clock):
    pipe, begun = io.StringIO(), clock.now
    with Display(pipe) as shown, progress.reported_to(shown.hear), progress.stage("rome"):
        with progress.stage("reading", 2000, unit="tokens") as advance:
            for _ in range(64):
                clock.now += 0.25
                advance(25)
                shown.tick()
        clock.now += 30
        shown.tick()
    assert clock.now - begun == 46
    assert pipe.getvalue().splitlines() == [
        "rome: reading, 200 of 2,000 tokens, 100 a second, 18 s left (2 s so far)",
        "rome: reading, 700 of 2,000 tokens, 100 a second, 13 s left (7 s so far)",
        "rome: reading, 1,200 of 2,000 tokens, 100 a second, 8 s left (12 s so far)",
        "rome (46 s so far)",
    ]


def test_a_step_that_takes_minutes_is_no_silence(clock):
    with piped("decomposing a matrix") as (pipe, shown):
        for _ in range(240):
            clock.now += 0.25
            shown.tick()
    lines = pipe.getvalue().splitlines()
    assert lines[0] == "decomposing a matrix (2 s so far)" and lines[-1] == "decomposing a matrix (57 s so far)"
    assert len(lines) == 12


def test_quick_work_says_nothing(clock):
    with piped("rome") as (pipe, shown):
        clock.now += 1.9
        shown.tick()
    assert pipe.getvalue() == ""


def test_a_foreign_text_is_one_line_of_signs(clock):
    with piped("opening a\x1b[2Jb\r\nc\u202ed") as (pipe, shown):
        clock.now += 3
        shown.tick()
    assert pipe.getvalue() == "opening a\\x1b[2Jb c\\x202ed (3 s so far)\n"


def test_a_stream_that_is_closed_does_not_end_the_work(clock):
    with piped("rome") as (pipe, shown):
        pipe.close()
        clock.now += 3
        shown.tick()


# --- at a terminal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "line"), [(80, "━"), (40, "2 s  rome: reading, 8 of 20 tokens, 4 s…")])
def test_a_terminal_shows_one_line_that_goes_away(width, line, clock, monkeypatch):
    screen = Screen()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    reading = partial(progress.stage, "reading", 20, unit="tokens")
    with Display(screen) as shown, progress.reported_to(shown.hear), progress.stage("rome"), reading() as advance:
        for _ in range(8):
            clock.now += 0.3
            advance()
            shown.tick()
        picture = screen.getvalue()
        assert line in picture and "\n" not in picture and "8 of 20" in picture
    assert screen.getvalue().endswith("\x1b[2K")
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1, "the cursor is back"


def test_an_interrupt_leaves_a_clean_terminal(clock, monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with pytest.raises(KeyboardInterrupt), progress.shown("edit"), progress.stage("rome"):
        clock.now += 3
        hearing_display().tick()
        assert "edit: rome" in screen.getvalue()
        raise KeyboardInterrupt
    assert screen.getvalue().endswith("\x1b[2K") and "\x1b[?25h" in screen.getvalue()


def hearing_display() -> Display:
    """The display that shows this thread's work."""
    return _here.listener.__self__  # type: ignore[union-attr]


def test_what_a_command_prints_does_not_mix_with_the_line(clock, monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    with progress.shown("edit"):
        clock.now += 3
        hearing_display().tick()
        say("a line")
        before = screen.getvalue()
        assert before.endswith("\x1b[2Ka line\n"), "the progress was taken away first"
        hearing_display().tick()
        LogHandler(screen).emit(logging.LogRecord("reknow", logging.WARNING, "", 0, "a warning", (), None))
        assert screen.getvalue().endswith("\x1b[2Ka warning\n")


def test_of_several_threads_a_terminal_shows_one(clock, monkeypatch):
    screen, begun, seen = Screen(), threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "stderr", screen)

    def other():
        with progress.stage("theirs"):  # shows itself, as it would alone
            clock.now += 3
            hearing_display().tick()
            begun.set()
            seen.wait(30)

    thread = threading.Thread(target=other)
    with progress.shown("ours"):
        clock.now += 3
        hearing_display().tick()
        thread.start()
        assert begun.wait(30)
        hearing_display().tick()
    seen.set()
    thread.join(30)
    assert "ours, starting" in screen.getvalue() and "theirs" not in screen.getvalue()


# --- in Python -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminal", "wish", "shows"),
    [(True, None, True), (True, "0", False), (False, None, False), (False, "1", True), (False, "0", False)],
)
def test_work_in_python_shows_itself_at_a_terminal_or_where_it_is_asked_to(terminal, wish, shows, clock, monkeypatch):
    stream = Screen() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("REKNOW_PROGRESS")
    if wish is not None:
        monkeypatch.setenv("REKNOW_PROGRESS", wish)
    with progress.stage("rome"), progress.stage("finding values", 3):
        assert (_here.listener is not None) == shows
        clock.now += 3
        if shows:
            hearing_display().tick()
    assert ("rome: finding values, 0 of 3" in stream.getvalue()) == shows


def test_a_program_that_could_start_notebooks_shows_nothing_either(clock, monkeypatch):
    pytest.importorskip("ipykernel.kernelapp")  # stays loaded: other tests of this process must not mind
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.delenv("REKNOW_PROGRESS")
    with progress.stage("rome"):
        assert _here.listener is None


def test_a_program_may_listen_instead(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    shares = []
    with progress.reported_to(lambda stage: shares.append(stage.share)), progress.shown("edit"):
        for _ in progress.each("learning", range(4)):
            clock.now += 5
    assert [share for share in shares if share is not None] == [0, 0.25, 0.5, 0.75, 1] and screen.getvalue() == ""


OPENED = """
import sys
from reknow import LM
from reknow.progress import progress
texts = []
with progress.reported_to(lambda stage: texts.append(str(stage))):
    LM(sys.argv[1])
assert any("loading weights" in text for text in texts), texts
from transformers.utils import logging
print("a bar", *logging.tqdm([1], desc="theirs"))
"""


@pytest.mark.slow
def test_opening_a_model_draws_no_bars_but_those_of_others_stay(tmp_path):
    run = subprocess.run([sys.executable, "-c", OPENED, saved(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout == "a bar 1\n" and "Loading" not in run.stderr and "theirs" in run.stderr


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (125, "2:05 min"), (4800, "1:20 h")]
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_a_model_hands_out_the_progress_of_the_process():
    assert make_lm().progress is progress and isinstance(LM, type)
