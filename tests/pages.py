"""What a reader copies from a page, run from top to bottom in a folder of its own.

A block with a title is a file. Lines of `console` that begin with `$` are run, and what is below each must be said,
line by line, up to blanks. `python` runs with the names of the blocks above. Blocks of other languages are not run.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from typer.testing import CliRunner

from reknow.cli import app
from serving_process import serving

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r'^```([\w-]+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ (.*(?:\\\n.*)*)\n?((?:(?!\$ ).*\n?)*)", re.MULTILINE)
_PORT = "127.0.0.1:8000"
"""Where pages serve; the tests take a free port."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    text: str


def blocks(page: str) -> list[Block]:
    return [Block(*found) for found in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))]


def commands(block: Block) -> list[tuple[str, str]]:
    """(command, what stands below it)."""
    return _COMMAND.findall(block.text)


def run_page(page: str, folder: Path) -> list[str]:
    """Runs the page in the folder, which is the current one, and gives all that its Python printed."""
    scope: dict = {}
    printed: list[str] = []
    address = _PORT
    with ExitStack() as servers:
        for language, title, text in blocks(page):
            text = text.replace(_PORT, address)
            if title:
                (folder / title).write_text(text, encoding="utf-8")
            elif language == "console":
                for command, below in commands(Block(language, title, text)):
                    words = shlex.split(command)
                    if words[:2] == ["reknow", "serve"]:
                        place = words.index("--port")
                        stacks = words[2:place] + words[place + 2 :]
                        address = servers.enter_context(serving(*stacks, folder=folder)).address[len("http://") :]
                    else:
                        check_said(command, below, said_by(command))
            elif language == "python":
                scope["print"] = lambda *values: printed.append(" ".join(map(str, values)))
                exec(compile(text, page, "exec"), scope)
    return printed


def said_by(command: str) -> str:
    """Standard output of a command, `reknow` by this process, others by a shell; they must end with status 0."""
    words = shlex.split(command)
    if words[0] == "reknow":
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}"
        return result.stdout
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def check_said(command: str, below: str, said: str) -> None:
    heard = " ".join(said.split())
    for line in filter(str.strip, below.splitlines()):
        assert " ".join(line.split()) in heard, f"{command}\nexpected {line!r} in:\n{said}"
