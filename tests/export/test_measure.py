"""An export whose edits are not said by what was written says so, whatever its form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import saved
from gguf_models import write_gguf
from reknow import LM, Edit, Patch, method
from reknow.cli import app
from reknow.export.measure import Answer, Measured, measure
from reknow.patching.stack import save_stack

pytestmark = pytest.mark.usefixtures("empty_folder")
FORMS = ("lora", "gguf-lora", "hf", "gguf")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, list[Patch], Path]:
    """A tiny model in a folder, patches that it follows, each made on those before, and its GGUF file."""
    folder = tmp_path_factory.mktemp("model")
    model = saved(folder / "model", "llama")
    lm = LM(model)
    for prompt, subject, new in (("The capital of {}", "Peru", "Paris"), ("{} speaks", "Zoë Übel", "French")):
        edit = Edit(prompt, subject=subject, target_new=new)
        lm.apply(method("ft-m", layer=2, steps=200).edit(lm, [edit]))
    return model, list(lm.patches), write_gguf(LM(model), folder / "base.gguf", "F32")


def export(source: Path, form: str, made) -> str:
    """What the command says on standard error."""
    base = ["--base", str(made[2])] if form == "gguf" else []
    result = CliRunner().invoke(app, ["export", str(source), f"out.{form}", "--to", form, *base])
    assert result.exit_code == 0, result.output
    return "".join(line for line in result.stderr.splitlines(True) if "was not asked" not in line)


def asked_of_nothing(patch: Patch) -> Patch:
    """The patch with an edit that it does not make."""
    return replace(patch, edits=(*patch.edits, Edit("The sea of {} is", subject="Peru", target_new="deep")))


@pytest.mark.parametrize("form", FORMS)
def test_edits_that_are_not_in_force_are_told(made, form):
    model, patches, _ = made
    stack = save_stack("mine", model, [patches[0], asked_of_nothing(patches[1])])
    assert export(stack, form, made) == (
        f"warning: out.{form} says 2 of 3 edits that were asked: not “The sea of Peru is deep”, which is not in "
        "force in memory either: put on what it was made on, or make it again\n"
    )


@pytest.mark.parametrize("form", FORMS)
def test_edits_that_are_in_force_are_no_warning(made, form):
    assert export(save_stack("mine", made[0], made[1]), form, made) == ""


def test_an_edit_that_a_later_one_replaces_is_not_missed(made):
    model, patches, _ = made
    lm = LM(str(save_stack("mine", model, patches)))
    again = Edit("The capital of {}", subject="Peru", target_new="Rome")
    lm.apply(method("ft-m", layer=2, steps=200).edit(lm, [again]))
    found = measure(lm)
    assert found.replaced == (True, False, False) and found.held == 2 and found.missed == []
    stack = save_stack("mine", model, lm.patches)
    assert export(stack, "lora", made) == ""


def test_what_was_lost_in_writing_is_told_apart():
    edits = tuple(Edit("The capital of {}", subject=name, target_new="Rome") for name in "abcd")
    yes, no = Answer(0.9, True), Answer(None, False)
    found = Measured(
        edits, 4, [no] * 4, [yes, yes, no, no], "float32", [yes, no, no, no], (False, False, False, True)
    )
    assert found.missed == [(edits[1], True), (edits[2], False)]
    assert replace(found, written=None).missed == [(edits[2], False)]


def test_what_truncation_loses_is_told(made):
    model, patches, _ = made
    save_stack("mine", model, patches)
    result = CliRunner().invoke(app, ["export", "mine", "out", "--to", "lora", "--max-rank", "1", "--truncate"])
    assert result.exit_code == 0, result.output
    assert "was lost in writing" in result.stderr
