"""Run folders below a folder: which are found, in which order, and by which names they are compared."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from reknow.errors import InputError
from reknow.report import run_list
from reknow.report.run_list import find_runs, name_runs
from synthetic_runs import make_results, write_run


def dated(folder: Path, started: str, **about) -> Path:
    write_run(folder, make_results({"rome": ([1, 0], [1, 1]), "ft-m": ([1, 1], [0, 1])}, **about))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "started": started}))
    return folder


def test_runs_are_listed_the_newest_first(tmp_path):
    dated(tmp_path / "runs/old", "2026-01-02T03:04:05+0000")
    dated(tmp_path / "runs/study/zsre", "2026-03-02T03:04:05+0000", name="zsre")
    dated(tmp_path / "new", "2026-02-02T03:04:05+0000")
    found = find_runs(tmp_path)
    assert [str(run.path) for run in found] == [
        os.path.join("runs", "study", "zsre"),
        "new",
        os.path.join("runs", "old"),
    ]
    assert found[1] == (Path("new"), "made up", "set", ["rome", "ft-m"], 2, "2026-02-02")
    assert found[1].line == "new · rome, ft-m · 2 cases of set · made up · 2026-02-02"


def test_what_is_no_run_is_not_listed(tmp_path, monkeypatch):
    (tmp_path / "training").mkdir()
    (tmp_path / "training/manifest.json").write_text('{"settings": {"steps": 3}}')
    (tmp_path / "training/rows.jsonl").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/manifest.json").write_text("{")
    (tmp_path / "broken/cases.jsonl").write_text("")
    started = write_run(tmp_path / "not begun", make_results({"rome": ([1], [1])}))
    for file in started.glob("*.jsonl"):
        file.unlink()
    write_run(tmp_path / ".hidden/run", make_results({"rome": ([1], [1])}))
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_runs(tmp_path) == [] and find_runs(tmp_path / "none") == []
    deep = write_run(tmp_path / "a/b/c/d/e/run", make_results({"rome": ([1], [1])}))
    assert find_runs(tmp_path) == [] and [run.path.name for run in find_runs(tmp_path / "a")] == ["run"]
    monkeypatch.setattr(run_list, "_MOST_FOLDERS", 3)
    assert find_runs(tmp_path / "a") == [] and [run.path for run in find_runs(deep.parent)] == [Path("run")]


def test_runs_are_named_by_their_folders_or_their_paths_where_these_are_alike(tmp_path):
    one, other = (write_run(tmp_path / name, make_results({"rome": ([1], [1])})) for name in ("a/run", "b/run"))
    assert name_runs([one]) == {"run": one} and name_runs([one, other]) == {str(one): one, str(other): other}
    assert name_runs([tmp_path / "a"]) == {"run": one}, "a study's folder"
    with pytest.raises(InputError, match=r"expected different runs; got .*: name each once"):
        name_runs([one, one])
