"""The rooms of the library stand on each other: imports run down, also those for types and those inside functions."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from house import HERE, ORDER, functions, imports, modules, room

MODULES = {name: path for name, path in modules().items() if name}


def test_every_room_has_a_place_and_every_place_a_room():
    assert {room(name) for name in MODULES} == set(ORDER)


def test_the_root_is_small():
    assert len(list((HERE / "reknow").glob("*.py"))) <= 10


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_down(name):
    place = ORDER.index(room(name))
    assert not {other for other in imports(MODULES[name], MODULES) if ORDER.index(room(other)) > place}


def test_imports_are_hidden_only_where_they_are_late():
    """The command line and the packages that import their names when they are used; all others say at once."""
    late = {name for name, path in MODULES.items() if "TYPE_CHECKING" in path.read_text(encoding="utf-8")}
    assert not {name for name in late if not name.startswith("cli.")} - {"datasets"}


def test_no_circle_of_files():
    below = {name: imports(path, MODULES) - {name} for name, path in MODULES.items()}
    while free := [name for name, others in below.items() if not others & set(below)]:
        for name in free:
            del below[name]
    assert not below, "these import each other"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_and_functions_can_be_read_at_once(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= (190 if name.startswith("methods.") else 120 if name == "contract" else 350)
    assert not {function: length for length, function in functions(MODULES[name]) if length > 60}


APPLIED = """
import sys
from reknow import LM, Patch
lm = LM("models/gpt2")
for file in sys.argv[1:]:
    lm.apply(Patch.load(file))
    print(*sorted(name for name in sys.modules if name.startswith("reknow.methods.")))
"""


@pytest.mark.slow
def test_a_patch_needs_the_code_of_its_memory_and_no_other_method():
    folder = Path(__file__).parent / "data/before"
    run = subprocess.run(
        [sys.executable, "-c", APPLIED, "patches/rome.patch", "patches/grace.patch"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == ["", "reknow.methods.grace"]


def test_only_the_page_knows_gradio():
    """Its room, and the command that opens it."""
    known = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "gradio" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gradio")
    }
    assert known and {room(name) for name in known} == {"ui"}
    users = {name for name, path in MODULES.items() if any(room(other) == "ui" for other in imports(path, MODULES))}
    assert {name for name in users if room(name) != "ui"} == {"cli.paging"}


@pytest.mark.slow
def test_neither_the_library_nor_the_command_line_loads_gradio_before_the_page_is_opened():
    code = "import sys, reknow.lm, reknow.evaluation, reknow.report, reknow.cli.app; print('gradio' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "False"
