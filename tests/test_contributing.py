"""The methods that the page on adding one shows are a file and a row each, and keep the whole contract."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import reknow.methods
from methods.test_contract import *  # noqa: F403, its tests, fixtures and marks, run on the methods of the page
from reknow import METHODS
from reknow.__main__ import main
from reknow.registry import Row

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "howto" / "add_a_method.md").read_text(encoding="utf-8"), re.DOTALL
)
ROWS = eval("{" + "".join(text for text in SNIPPETS if text.startswith(" ")) + "}", {"Row": Row})
HOMES = [f"{row.home.partition(':')[0]}.py" for row in ROWS.values()]
FILES = dict(zip(HOMES, (text for text in SNIPPETS if text.startswith('"""')), strict=True))


@pytest.fixture(autouse=True, scope="module")
def added(tmp_path_factory):
    """The files lie among the others', and the rows are in the table."""
    folder = tmp_path_factory.mktemp("methods")
    for file, text in FILES.items():
        (folder / file).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reknow.methods, "__path__", [*reknow.methods.__path__, str(folder)])
        for name, row in ROWS.items():
            patched.setitem(METHODS, name, row)
        yield


@pytest.fixture(params=ROWS)
def name(request) -> str:
    return request.param


@pytest.mark.parametrize(("file", "limit"), zip(FILES, (25, 40), strict=True))
def test_it_is_short(file, limit):
    code = [line for line in map(str.strip, FILES[file].splitlines()) if line and not line.startswith('"""')]
    assert len(code) <= limit


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=str)
@pytest.mark.parametrize("file", FILES)
def test_it_has_the_style_of_the_project(file, command):
    pytest.importorskip("ruff")
    place = ["--stdin-filename", f"src/reknow/methods/{file}", "-"]
    found = subprocess.run(
        [sys.executable, "-m", "ruff", *command, *place], input=FILES[file], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
def test_the_command_line_knows_it(name, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["reknow", "edit", "{Danielle Darrieux} speaks", "English", "--method", name])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert "English" in capfd.readouterr().out
