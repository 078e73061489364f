"""The how-to pages do what they say: every line that a reader copies is run, in order, and says what is below it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import ROOT, blocks, check_said, commands, run_page, said_by
from reknow import LM
from reknow.model.sources import find_source

PAGES = ["docs/which_method.md"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "howto").glob("*.md"))
SHOWN = {"docs/howto/add_a_method.md"}
"""Pages whose code is run by a test of its own: `tests/test_contributing.py`."""
SAYS = {
    "docs/howto/own_model.md": ["English"],
    "docs/howto/transformers.md": ["English", "English", "French"],
    "docs/howto/users.md": ["alice English", "bob French", "English"],
    "docs/howto/add_a_family.md": ["model.layers.0.mlp.down_proj"],
}
"""What the Python of a page prints, a word or two of each line."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder with what pages presuppose: a model of the reader's, `my-model`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(find_source("demo:gpt2").name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page not in SHOWN])
def test_a_page_runs_as_it_stands(page, folder):
    if page.endswith("llama_cpp.md"):
        pytest.importorskip("gguf")
        from gguf_models import write_gguf

        (folder / "my-model").unlink()
        (folder / "my-model").symlink_to(find_source("demo:llama").name)
        write_gguf(LM(folder / "my-model"), folder / "base.gguf")
    printed = run_page(page, folder)
    wanted = SAYS.get(page, [])
    assert len(printed) == len(wanted)
    for line, words in zip(printed, wanted, strict=True):
        assert " ".join(words.split()) in " ".join(line.split()), line


@pytest.mark.slow
@pytest.mark.real
def test_the_command_of_the_readme_says_what_stands_there(folder, smollm2):
    for block in blocks("README.md"):
        if block.language == "console":
            for command, below in commands(block):
                check_said(command, below, said_by(command))


def test_pages_have_something_to_run():
    assert len(PAGES) >= 8
    for page in set(PAGES) - SHOWN:
        assert {"console", "python"} & {block.language for block in blocks(page)}, page
