"""The notebooks run from top to bottom, and print what stands below their cells."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from pages import ROOT

pytestmark = pytest.mark.slow
nbclient, jupytext = pytest.importorskip("nbclient"), pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.md"))


def printed(cell) -> str:
    return " ".join("".join(one["text"] for one in cell.outputs if one["output_type"] == "stream").split())


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_prints_what_it_shows(file, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = jupytext.read(file)
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = notebook.cells
    assert sum(cell.cell_type == "code" for cell in cells) > 4
    shown = 0
    for cell, below in pairwise(cells):
        block = below.cell_type == "markdown" and re.match(r"```text\n(.*?)```", below.source, re.DOTALL)
        if cell.cell_type == "code" and block:
            shown += 1
            for line in filter(str.strip, block[1].splitlines()):
                assert " ".join(line.split()) in printed(cell), f"{cell.source}\n{printed(cell)}"
    assert shown


def test_in_a_notebook_long_work_shows_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.delenv("REKNOW_PROGRESS", raising=False)
    source = "from reknow.progress import _here, progress\nwith progress.stage('rome'):\n    print(_here.listener)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "Display.hear" in printed(notebook.cells[0])
