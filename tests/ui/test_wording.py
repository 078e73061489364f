"""Sentences of the library on the page: what they say of options is said of what the page has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from reknow.errors import InputError
from reknow.export.formats import check_format
from reknow.ui.drawing import draw
from reknow.ui.wording import PHRASES, on_page

SOURCE = Path(__file__).parent.parent.parent / "src" / "reknow"
REACHED = (
    "contract.py", "lm.py", "model", "patching", "tracing", "editing", "memories", "methods", "export",
    "evaluation/effect.py", "evaluation/tried.py", "files/unforeseen.py",
)  # fmt: skip
"""Where sentences come from that the page tells."""
NOT_REACHED = ("sharing.py", "card.py", "formats.py", "layer_choice.py", "covariance.py", "packaged.py")
"""Of these: what is written for the hub, what the page says before in its own words, what it never asks for, and
commands of pip."""
OPTION = re.compile(r"(?<![\w`-])--[a-z]")


def sentences(file: Path) -> list[str]:
    """The texts of a file as they are said, `{}` for what is filled in."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    filled = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in filled for part in node.values}
    whole = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in parts]
    return [text for text in whole if isinstance(text, str)] + [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        for node in filled
    ]


def reached() -> list[Path]:
    places = [SOURCE / name for name in REACHED]
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*.py")))]
    assert len(files) > 60
    return files


@pytest.mark.parametrize("phrase", PHRASES)
def test_what_is_said_otherwise_is_what_the_library_says(phrase):
    assert any(phrase in text for file in reached() for text in sentences(file))


def test_no_sentence_names_an_option_without_the_command_that_has_it():
    wrong = [
        (file.name, text)
        for file in reached()
        if file.name not in NOT_REACHED
        for text in map(on_page, sentences(file))
        if " " in text and not text.startswith("--") and OPTION.search(re.sub(r"`reknow [^`]*`", "", text))
    ]
    assert wrong == []


def test_it_is_said_so_where_messages_and_exports_are_drawn(tmp_path):
    with pytest.raises(InputError) as caught:
        check_format("gguf", tmp_path)
    drawn = draw("message", str(caught.value), ["float16: --dtype float32 keeps them all"], "")
    assert "expected the GGUF file of the base model;" in drawn and "`reknow ui --dtype float32` keeps" in drawn
    assert "--base" not in drawn
