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
    found = json.loads(erase(*words, "--json", "--force", "--paraphrase", "{}'s capital is").stdout)
    assert found["old"] == "Lima" and len(found["left"]) == 2
    [warning] = found["warnings"]
    assert warning.startswith("the model did not say “Lima” to the prompt before either (it came at rank ")
    assert f"warning: {warning}\n" == result.stderr and found["old_was_said"] is False
    assert found["said_before"] and f"it said “{found['said_before']}”" in warning
    assert found["after"]["ways"][1]["prompt"] == "Peru's capital is" and len(found["after"]["layers"]) == 3


FACT = "The mother tongue of {Danielle Darrieux} is"
KNOWING = ["--model", "demo:llama", "--method", "ft-m", "--set", "steps=2", "--set", "layer=0"]


def test_what_the_model_says_is_the_old_answer():
    result = erase(FACT, "--json", *KNOWING)
    found = json.loads(result.stdout)
    assert found["old"] == "French" and found["old_was_said"] and found["said_before"].startswith("French")
    still = ["the model still says “French” to the prompt itself: take another --method or --target"]
    assert found["warnings"] == (still if found["after"]["ways"][0]["rank"] == 1 else [])


@pytest.mark.parametrize(
    "words", [["--target", "French"], ["--target", " french. "], ["--old", "French", "--target", "French"]]
)
def test_a_target_that_is_the_old_answer_is_refused(words, empty_folder):
    result = erase(FACT, *words, *KNOWING)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: expected a --target ") and words[-1] in result.stderr
    assert list(empty_folder.iterdir()) == []


@pytest.mark.slow
def test_what_was_not_said_before_is_not_reported_as_taken_out():
    result = erase(FACT, "--old", "German", "--json", *KNOWING)
    found = json.loads(result.stdout)
    assert found["old_was_said"] is False and found["before"]["ways"][0]["rank"] > 1
    assert "the model did not say “German” to the prompt before either" in result.stderr
    assert "it said “French" in result.stderr and "the patch only makes" not in result.stderr
    result = erase(FACT, "--old", "German", "--target", "French", "--force", *KNOWING)
    assert "the model said “French” to the prompt before: the patch only makes it say so more firmly" in result.stderr
    assert result.stderr.count("warning: ") == result.stderr.count("\n") == 2


def test_a_model_that_says_nothing_is_told_of(model):
    result = erase("The capital of {Peru}", "--model", model, "--json", *QUICK)
    if result.exit_code == 2:  # a random model may begin with a mark
        assert "name it with --old" in result.stderr
    else:
        assert json.loads(result.stdout)["old"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["The capital is"], "subject"),
        (["The capital of {Peru} is", "--paraphrase", "Which one?"], "expected a paraphrase with {}"),
        (["The capital of {Peru} is", "--method", "rom"], "Did you mean 'rome'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_work(words, said, empty_folder):
    result = erase(*words)
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
    assert list(empty_folder.iterdir()) == []
