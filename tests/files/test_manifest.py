"""The manifest of a run folder: what must be the same for a run to go on."""

from __future__ import annotations

import json

import pytest

from reknow.errors import InputError
from reknow.files.manifest import MANIFEST_FILE, open_manifest


def test_a_file_that_a_setting_names_is_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks.json").write_text("one")
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "editor.safetensors").write_text("one")
    named = {"families": "tasks.json", "editor": "trained", "cases": "none.jsonl", "steps": 3}
    settings, run = {"methods": {"mine": named}, "dataset": "tasks.json"}, tmp_path / "run"
    run.mkdir()
    opened = open_manifest(run, settings, {})
    assert opened == open_manifest(run, settings, {})
    assert sorted(opened["contents"]) == ["methods.mine.editor", "methods.mine.families"]
    for file in ("tasks.json", "trained/editor.safetensors"):
        (tmp_path / file).write_text("two")
        name = "families" if file == "tasks.json" else "editor"
        with pytest.raises(InputError, match=rf"mine.{name}, {named[name]}, is a file of other content: take"):
            open_manifest(run, settings, {})
        (tmp_path / file).write_text("one")
    (tmp_path / "tasks.json").write_text("two")
    before = json.loads((run / MANIFEST_FILE).read_text())
    del before["contents"]  # of an earlier version
    (run / MANIFEST_FILE).write_text(json.dumps(before))
    assert open_manifest(run, settings, {})["settings"] == settings
