"""`reknow ui` as a command: what it needs, a port that is taken, and its end in the midst of an edit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from drive_page import write
from serving_process import PROGRAM, listening
from web_page import PATIENCE

HIDDEN = "import sys; sys.modules['gradio'] = None\n"


def run_ui(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", before + PROGRAM, "ui", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )


def test_without_gradio_the_page_says_what_to_install(empty_folder):
    result = run_ui("--port", "0", before=HIDDEN)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: the web page needs the package 'gradio', which is not installed; run: pip install 'reknow[ui]'\n"
    )


def test_a_port_that_is_taken_is_told_at_once(empty_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_ui("--port", str(port), before=HIDDEN)  # before what takes seconds is loaded
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(
        f"error: expected to listen at 127.0.0.1, port {port}; got Address already in use:"
    )


def test_a_place_for_stacks_that_is_a_file_is_refused_before_anything_is_loaded(empty_folder):
    (empty_folder / "notes").write_text("mine")
    result = run_ui("--stacks", "notes", before=HIDDEN)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: expected --stacks as a folder; notes is none: choose another name\n"


LOADED = """
import inspect, jinja2
from reknow.ui.loading import without_stubs
known, written = inspect.getfile, []
jinja2.Template.render = lambda template, **values: written.append(values) if "contents" in values else ""
with without_stubs():
    import gradio
print(len(written), inspect.getfile is known, callable(gradio.Button("ok").click), inspect.getfile(gradio.HTML)[-7:])
"""


@pytest.mark.slow
def test_gradio_is_loaded_without_writing_stubs():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", LOADED], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0", "True", "True", "html.py"]


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_quietly_in_the_midst_of_an_edit(chromium, tmp_path, signal_):
    with listening("ui", folder=tmp_path) as served:
        tab = chromium.new_page()
        tab.set_default_timeout(PATIENCE)
        tab.goto(served.address)
        begin_a_long_edit(tab)
        served.process.send_signal(signal_)
        how, status = ("interrupted", 130) if signal_ == signal.SIGINT else ("terminated", 143)
        assert served.process.wait(60) == status
        tab.close()
    said = (tmp_path / "server.log").read_text()
    assert said == f"stopped: {how}; files that were written are whole\n"


def begin_a_long_edit(tab) -> None:
    tab.locator("#stack-line .note").wait_for()
    tab.click("#more button")
    tab.click("#other input")
    tab.get_by_role("option", name="kn", exact=True).click()
    write(tab, prompt="The mother tongue of Danielle Darrieux is", subject="Danielle Darrieux", target="English")
    tab.click("#go")
    tab.locator("#status .work").wait_for()
