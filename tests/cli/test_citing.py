"""The papers of the methods: each is known, an entry is BibTeX, and CITATION.cff names the same ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from reknow.cli.app import app
from reknow.cli.citing import cite, known_papers
from reknow.errors import InputError
from reknow.registry import METHODS, Row

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", METHODS)
def test_an_entry_names_the_paper_of_the_row(name):
    entry, row = cite(name), METHODS[name].paper
    assert re.match(r"@misc\{[a-z]+\d{4}[a-z]+,\n", entry) and entry.count("{") == entry.count("}")
    number = re.search(r"eprint = \{(.*)\}", entry)[1]
    family = re.search(r"author = \{(?:[^{} ]+ )+?\{?((?:De )?[^{} ]+)\}?(?: and|\},)", entry)[1]
    archive = re.search(r"archivePrefix = \{(.*)\}", entry)[1]
    assert row.endswith(f"{archive} {number}") and f"{family} et al. {known_papers()[number]['year']}" in row


def test_the_command_prints_one_or_all():
    one = CliRunner().invoke(app, ["methods", "--cite", "rome"])
    assert one.exit_code == 0 and one.output.strip() == cite("rome")
    every = CliRunner().invoke(app, ["methods", "--cite"])
    assert every.output.count("@misc{") == len(known_papers())


def test_a_method_without_a_known_paper_is_said(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", Row("rome:ROME", {}, "no paper's: an example"))
    with pytest.raises(InputError, match="cite it by hand"):
        cite("mine")


def test_the_citation_file_has_all_of_them_and_the_version():
    from reknow import __version__

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__
    named = {one["identifiers"][0]["value"].partition(":")[2]: one for one in cited["references"]}
    assert {number: (one["title"], one["year"], _names(one)) for number, one in named.items()} == {
        number: (paper["title"], paper["year"], [re.sub("[{}]", "", name) for name in paper["authors"]])
        for number, paper in known_papers().items()
    }


def _names(reference: dict) -> list[str]:
    return [f"{author['given-names']} {author['family-names']}" for author in reference["authors"]]
