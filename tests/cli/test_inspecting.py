"""`inspect` says what somebody else's edit changed."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from conftest import make_lm, save, saved
from reknow.cli import app
from reknow.evaluation.differences import subject_keys

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def edited(tmp_path_factory) -> str:
    """A checkpoint whose value matrix of layer 1 gives something else for Boris Wu, and for nobody in particular."""
    lm, folder = make_lm("llama"), tmp_path_factory.mktemp("edited")
    names = ["Anna Smith", "Boris Wu", "Chloe Lopez"]
    keys = subject_keys(lm, names).keys(1)
    direction = torch.linalg.pinv(keys)[:, 1].float()  # 1 for his key and 0 for the others
    weight = lm.weight(lm.parts.value[1])
    weight += torch.ones(len(weight), 1) * direction
    return save(lm, folder)


def inspect(*words: str):
    return CliRunner().invoke(app, ["inspect", *words])


@pytest.mark.slow
def test_what_was_changed_and_about_whom(base, edited, empty_folder):
    names = empty_folder / "names.txt"
    names.write_text("Anna Smith\nBoris Wu\n\nChloe Lopez\nBoris Wu\n", encoding="utf-8")
    result = inspect(edited, "--base", base, "--subjects", "names.txt")
    assert result.exit_code == 0, result.output
    first, *rest = result.stdout.splitlines()
    assert first.startswith("1 of ") and first.endswith(f"tensors differ from {base}")
    assert any(line.split()[:5] == ["model.layers.1.mlp.down_proj.weight", "32", "×", "64", "1"] for line in rest)
    assert any(line == "of 3 subjects, model.layers.1.mlp.down_proj.weight changes most for:" for line in rest)
    assert rest[-3].split()[:2] == ["Boris", "Wu"]
    found = json.loads(inspect(edited, "--base", base, "--subjects", "names.txt", "--json").stdout)
    (one,) = found["differences"]
    assert one["rank"] == 1 and one["subjects"][0]["subject"] == "Boris Wu" and found["subjects"] == 3
    assert one["subjects"][0]["relative"] > 100 * one["subjects"][1]["relative"]
    assert json.loads(inspect(edited, "--base", base, "--json").stdout)["subjects"] > 900, "CounterFact's"


def test_a_copy_has_no_difference(base, tmp_path):
    result = inspect(saved(tmp_path / "copy", "llama"), "--base", base)
    assert result.exit_code == 0 and result.stdout.startswith("no tensor of ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "BASE/../base"], "expected an edited model and its base; got"),
        (["--base", "demo:gpt3"], "unknown demo model 'gpt3'. Did you mean 'gpt2'?"),
        (["--base", "EDITED", "--subjects", "none.txt"], "no such file"),
        (["--base", "EDITED", "--subjects", "empty.txt"], "expected subjects in empty.txt, one a line; got none"),
        ([], "--base"),
    ],
)
def test_bad_input_is_one_sentence(words, said, base, edited, empty_folder):
    (empty_folder / "empty.txt").write_text("\n \n")
    places = {"BASE/../base": f"{base}/../{base.rpartition('/')[2]}", "EDITED": edited}
    result = inspect(base, *(places.get(word, word) for word in words))
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.stderr
