"""The method that CONTRIBUTING.md shows: one file and one row, and everything knows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import reknow.methods
from conftest import bits, make_lm, same
from reknow import METHODS, Edit, Patch, method
from reknow.__main__ import main
from reknow.registry import Row

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILE, ROW = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
EDITS = [
    Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="of"),
    Edit("{} is a citizen of", subject="Peru", target_new="in"),
]


@pytest.fixture
def added(tmp_path, monkeypatch) -> str:
    """The name of the method, whose file lies among the others and whose row is in the table."""
    (name, row), home = next(iter(eval(f"{{{ROW}}}", {"Row": Row}).items())), reknow.methods
    (tmp_path / f"{row.home.partition(':')[0]}.py").write_text(FILE, encoding="utf-8")
    monkeypatch.setattr(home, "__path__", [*home.__path__, str(tmp_path)])
    monkeypatch.setitem(METHODS, name, row)
    return name


def test_it_is_short():
    assert len(FILE.splitlines()) <= 32 and sum(bool(line.strip()) for line in FILE.splitlines()) <= 25


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_it_is_a_method(added, family, tmp_path):
    lm = make_lm(family)
    before = bits(lm)
    asked, answers = [edit.text for edit in EDITS], [edit.target_new for edit in EDITS]
    unedited = lm.score(asked, answers)
    patch = method(added, strength=3).edit(lm, EDITS)
    assert same(bits(lm), before) and patch.settings == {"strength": 3.0}
    patch.save(tmp_path / "a.patch")
    lm.apply(Patch.load(tmp_path / "a.patch"))
    assert all(now.nll < then.nll for now, then in zip(lm.score(asked, answers), unedited, strict=True))
    lm.revert(patch)
    assert same(bits(lm), before)


@pytest.mark.slow
def test_the_command_line_knows_it(added, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["reknow", "edit", "{Danielle Darrieux} speaks", "English", "--method", added])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert "English" in capfd.readouterr().out
