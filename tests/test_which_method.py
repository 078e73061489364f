"""The table of all methods on the page that helps to choose: its numbers are the results', its needs the code's."""

from __future__ import annotations

import re

from pages import ROOT
from reknow.learning.learned import Learned
from reknow.registry import METHODS, NEED_A_SUBJECT

PAGE = (ROOT / "docs" / "which_method.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results" / "real_models.md").read_text(encoding="utf-8")
COLUMNS = "| method | facts | reliability | generalization | locality |"


def rows(text: str) -> dict[str, list[str]]:
    """Method → its other cells, of lines that begin with a name of the table of methods; the first of each."""
    found: dict[str, list[str]] = {}
    for line in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if re.fullmatch(r"`[\w-]+`", name):
            found.setdefault(name.strip("`"), cells)
    return found


CHOICE = rows(PAGE[PAGE.index("## All methods") :])


def test_numbers_are_those_of_the_results():
    measured = rows(RESULTS[RESULTS.index(COLUMNS) :])
    measured = {name: cells for name, cells in measured.items() if name in METHODS}
    assert set(CHOICE) == set(measured) and len(CHOICE) > 20
    for name, (said, paraphrases, neighbours, seconds, *_) in CHOICE.items():
        _, *scores = measured[name]
        assert [float(score.split()[0]) for score in scores[:3]] == [
            float(number) for number in (said, paraphrases, neighbours)
        ], name
        assert scores[-1] == seconds, name


def test_the_best_come_first():
    means = [
        3 / sum(1 / float(number) for number in cells[:3]) if all(map(float, cells[:3])) else 0.0
        for cells in CHOICE.values()
    ]
    assert means == sorted(means, reverse=True)


def test_needs_are_what_the_methods_need():
    for name, cells in CHOICE.items():
        method = METHODS[name].method
        needs = ["yes" if name in NEED_A_SUBJECT else "–", "yes" if issubclass(method, Learned) else "–"]
        assert cells[4:] == [*needs, "yes" if method.kind == "weights" else "no"], name


def test_methods_that_the_page_names_are_there():
    named = set(re.findall(r"`([a-z][\w-]*)`", PAGE))
    others = {"reknow", "check"}
    assert not {name for name in named - others if name not in METHODS}
    assert set(METHODS) <= named
