"""`erase` takes out what the model says, and says what is left."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from conftest import saved
from reknow import Patch
from reknow.cli import app

pytestmark = pytest.mark.usefixtures("empty_folder")
QUICK = ["--method", "ft-m", "--set", "steps=200", "--set", "layer=2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("model"), "gpt2")


def erase(*words: str):
    return CliRunner().invoke(app, ["erase", *words])


def test_what_is_taken_out_and_what_is_left(model, empty_folder):
    words = ["The capital of {Peru}", "--model", model, "--old", "Lima", "--target", "Paris", *QUICK]
    result = erase(*words)
    assert result.exit_code == 0, result.output
    assert "“Lima” behind" in result.stdout and "rank in the state of each layer, after: " in result.stdout
    assert "left: “Lima” comes first in " in result.stdout and "not touched: what follows from it" in result.stdout
    patch = Patch.load("erase-peru.patch")
    assert f"wrote erase-peru.patch (id {patch.id})" in result.stdout
    (edit,) = patch.edits
    assert edit.target_new == "Paris" and edit.target_true is None, "the patch does not keep the old answer"
    found = json.loads(erase(*words, "--json", "--force", "--reworded", "{}'s capital is").stdout)
    assert found["old"] == "Lima" and len(found["left"]) == 2
    assert found["after"]["ways"][1]["prompt"] == "Peru's capital is" and len(found["after"]["layers"]) == 3


def test_what_the_model_says_is_the_old_answer(model):
    result = erase("The capital of {Peru}", "--model", model, "--json", *QUICK)
    if result.exit_code == 2:  # a random model may begin with a mark
        assert "name it with --old" in result.stderr
    else:
        assert json.loads(result.stdout)["old"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["The capital is"], "subject"),
        (["The capital of {Peru} is", "--reworded", "Which one?"], "expected a rewording with {}"),
        (["The capital of {Peru} is", "--method", "rom"], "Did you mean 'rome'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_work(words, said, empty_folder):
    result = erase(*words)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
    assert list(empty_folder.iterdir()) == []
