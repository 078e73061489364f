"""The Python in README and tour runs as written, and the README's map is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def snippets(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["README.md", "docs/tour.md"])
def test_the_python_of_a_page_runs(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    code = snippets(file, "python")
    assert code
    for part in code:
        exec(compile(part, file, "exec"), scope)


def test_the_map_is_true():
    (tree,) = snippets("README.md", "text")
    folders: dict[int, str] = {}  # by indent
    named = set()
    for line in filter(str.strip, tree.splitlines()):
        indent = len(line) - len(line.lstrip())
        parent = "".join(folder for depth, folder in folders.items() if depth < indent)
        name = line.split()[0]
        named.add(parent + name)
        folders = {depth: folder for depth, folder in folders.items() if depth < indent}
        if name.endswith("/"):
            folders[indent] = name
    assert not {name for name in named if not (ROOT / name).exists()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "src/reknow").glob("*.py")} - named <= {
        "src/reknow/__init__.py"
    }


def test_every_public_name_is_there():
    import reknow

    for name in reknow.__all__:
        assert getattr(reknow, name) is not None


@pytest.mark.parametrize("page", ["docs/architecture.md"])
def test_files_that_a_page_names_are_there(page):
    named = re.findall(
        r"`((?:src/|tests/|docs/|scripts/)?[a-z_]+/[a-z_/]+\.(?:py|md))`", (ROOT / page).read_text(encoding="utf-8")
    )
    assert named and not [
        name for name in named if not (ROOT / name).exists() and not (ROOT / "src/reknow" / name).exists()
    ]
