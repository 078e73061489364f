"""`app.py` as a Space runs it: a program, in a folder that is not its own, for people who do not own the machine."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from drive_page import keep, try_edit
from serving_process import started

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page_process(page_folder):
    with started(ROOT / "app.py", folder=page_folder, PYTHONUNBUFFERED="1", PYTHONPATH="") as served:
        yield served


@pytest.mark.browser
@pytest.mark.slow
def test_a_stranger_edits_and_reaches_nothing_of_the_machine(open_tab, page_folder):
    tab = open_tab("/?stack=guessed")
    name = tab.evaluate("new URL(location.href).searchParams.get('stack')")
    assert re.fullmatch("page-[0-9a-f]{32}", name)
    try_edit(tab)
    assert "now says English" in tab.inner_text("#tried .lead")
    keep(tab)
    assert "1 patch on" in tab.inner_text("#stack-line")
    assert [path.name for path in page_folder.iterdir()] == ["server.log"]
    tab.click("#model input")
    offered = [text.split()[-1] for text in tab.get_by_role("option").all_inner_texts()]
    assert offered == ["demo:gpt2", "demo:llama"]
    tab.fill("#model input", "/etc")
    tab.keyboard.press("Enter")
    tab.get_by_role("tab", name="Compare").click()
    tab.locator("#duel-go").wait_for()
    assert tab.get_by_role("tab", name="Runs").count() == 0
    tab.reload()
    tab.get_by_text("1 patch on").wait_for()
    assert tab.url.endswith(name) and tab.input_value("#model input") == "demo:gpt2"


def test_a_space_installs_what_the_project_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line[:1] not in ("", "#")] == project["dependencies"]


def test_the_lines_of_the_page_begin_a_space():
    page = (ROOT / "docs/ui.md").read_text(encoding="utf-8")
    (front,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (pinned,) = re.findall(r"^gradio==(\S+?);", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"sdk: gradio", f"sdk_version: {pinned}", "app_file: app.py"} <= set(front.splitlines())
