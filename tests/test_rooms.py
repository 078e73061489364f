"""The rooms of the library stand on each other: imports run down, also those for types and those inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src/reknow"

ORDER = (
    "errors",
    "progress",
    "texts",
    "edits",
    "checks",
    "registry",
    "files",
    "datasets",
    "model",
    "patching",
    "lm",
    "contract",
    "tracing",
    "editing",
    "learning",
    "memories",
    "methods",
    "evaluation",
    "report",
    "instructions",
    "export",
    "studies",
    "cli",
    "__main__",
)
"""Rooms and files of the root, the lowest first. `__init__` only names what is public."""


def modules() -> dict[str, Path]:
    """Dotted name below `reknow` → file; a package's own file has the package's name."""
    named = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of ours that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: expected absolute imports"
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
            wanted = [full if full.removeprefix("reknow.") in MODULES else str(node.module) for full in wanted]
        elif isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        else:
            continue
        found |= {full.removeprefix("reknow.") for full in wanted if full.startswith("reknow.")}
    return found


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_room_has_a_place():
    assert {room(name) for name in MODULES if name} <= set(ORDER)
    assert {
        place for place in ORDER if not (SOURCE / place).exists() and not (SOURCE / f"{place}.py").exists()
    } == set()


def test_the_root_is_small():
    assert len(list(SOURCE.glob("*.py"))) <= 10


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name))
def test_imports_run_down(name):
    up = {other for other in imports(name) if ORDER.index(room(other)) > ORDER.index(room(name))}
    assert not up


def test_no_circle_of_files():
    below = {name: imports(name) - {name} for name in MODULES if name}
    while free := [name for name, others in below.items() if not others & set(below)]:
        for name in free:
            del below[name]
    assert not below, "these import each other"
