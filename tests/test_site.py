"""The site: it is built without a warning by two programs, every page is in its navigation, its lists are true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest

from llms import FILES, list_pages, site_settings, write_list
from reknow.registry import FAMILIES, METHODS, NEED_A_SUBJECT

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LOCAL_ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "NO_COLOR": "1"}


def build(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Builds the site of this checkout into `folder`/site, so that nothing is written into the checkout."""
    (folder / "mkdocs.yml").write_bytes((ROOT / "mkdocs.yml").read_bytes())
    copytree(DOCS, folder / "docs")  # Zensical reads no pages behind a link
    (folder / "src").symlink_to(ROOT / "src")
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=LOCAL_ENVIRONMENT, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_nothing_of_a_network(tmp_path):
    pytest.importorskip("zensical")
    done = build(tmp_path, "zensical", "build", "--clean", "--strict")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "griffe" not in said and "No issues found" in said
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) == len(list(DOCS.rglob("*.md"))) + 1  # and the one for what is not there
    for page in pages:
        fetched = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?://[^\"> ]+)", page.read_text("utf-8"))
        assert not fetched, page
    shown = (tmp_path / "site/api/lm/index.html").read_text("utf-8")
    assert "apply" in shown and "_restack" not in shown


@pytest.mark.slow
def test_plain_mkdocs_builds_it_too(tmp_path):
    pytest.importorskip("mkdocs")
    done = build(tmp_path, "mkdocs", "build", "--strict", "--theme", "mkdocs")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site/results/speed/index.html").exists()


def test_every_page_is_in_the_navigation_once():
    pages = [page for _, page in list_pages(site_settings()["nav"])]
    assert sorted(pages) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_lists_for_language_models_are_those_of_the_pages(path):
    assert path.read_text(encoding="utf-8") == write_list(FILES[path]), "python scripts/llms.py makes it again"


def test_the_table_of_methods_has_every_row_and_what_it_needs():
    page = (DOCS / "methods/index.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| \[`([\w-]+)`\]\((\w+\.md)\) \| ([^|]+) \| (\w+) \| (\w+) \| (\w+) \|$", page, re.MULTILINE
    )
    assert sorted(name for name, *_ in rows) == sorted(METHODS)
    said = {name: text for methods in FAMILIES.values() for name, text in methods.items()}
    for name, file, sentence, subject, training, export in rows:
        kind = METHODS[name].method
        assert sentence == said[name]
        assert f"`{name}`" in (DOCS / "methods" / file).read_text(encoding="utf-8")
        assert (subject == "yes") == (name in NEED_A_SUBJECT), name
        assert (export == "yes") == (kind.kind == "weights"), name
        assert (training == "yes") == ("editor" in kind.__dataclass_fields__), name


def test_every_class_of_a_method_has_its_place_in_the_api():
    page = (DOCS / "api/methods.md").read_text(encoding="utf-8")
    homes = {f"reknow.methods.{row.home.replace(':', '.')}" for row in METHODS.values() if isinstance(row.home, str)}
    assert homes == set(re.findall(r"^::: (reknow\.methods\.\w+\.\w+)$", page, re.MULTILINE))


def test_links_of_the_pages_at_the_root_lead_somewhere():
    for page in ROOT.glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("[!i]*.md")), ids=lambda page: page.stem)
def test_what_a_page_of_the_api_imports_is_there(page):
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, page.name, "exec"), {})


def test_the_first_page_shows_the_command_of_the_readme():
    first, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/index.md", "README.md"))
    commands = re.findall(r"^\$ (reknow .*)$", first, re.MULTILINE)
    assert commands and all(command in readme for command in commands)
    assert f"{len(METHODS)} methods and variants" in first
