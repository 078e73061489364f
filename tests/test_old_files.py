"""Files of the version before this one: they load and give the same model, and what was interrupted goes on.

`scripts/make_old_files.py` wrote tests/data/before, whose `expected.json` tells what came of it then. Weights, which
are summed in float64, have the same bits; what a model computes is rounded in another way on other machines, and what
is searched or learned again with the settings of a file more so.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from conftest import bits, same
from reknow import LM, Edit, Patch, method
from reknow.cli import app

BEFORE = Path(__file__).parent / "data" / "before"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())
PATCHES = [name for name, told in EXPECTED["patches"].items() if "model" in told]
STACKS = [name for name, told in EXPECTED["patches"].items() if "ids" in told]
COMMANDS: dict[str, list[str]] = EXPECTED["commands"]
"""What was interrupted → its command, which takes it up."""
EDITORS = [name for name, words in COMMANDS.items() if words[0] == "train"]
RUNS = list(EXPECTED["means"])
MENDED = {"pmet", "ike-easyedit"}
"""Methods whose edits come out in another way on purpose: PMET wrote over a band more than it had searched, and
EasyEdit's IKE left out the nearest of the demonstrations that did not fit."""
AGAIN = 0.01
"""How far what is computed again from the settings may be off, in nats or as a share."""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory) -> Iterator[Path]:
    """A copy of the files as the current folder, since they name each other by relative paths."""
    here, copy = Path.cwd(), tmp_path_factory.mktemp("old") / "before"
    shutil.copytree(BEFORE, copy)
    os.chdir(copy)
    yield copy
    os.chdir(here)


@pytest.fixture(scope="module")
def models(folder) -> dict[str, LM]:
    return {name: LM(name) for name in EXPECTED["models"]}


@pytest.fixture(scope="module")
def weights(folder) -> dict[str, dict[str, torch.Tensor]]:
    """Patch → parameter → what it was with the patch."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file("expected.safetensors").items():
        patch, _, parameter = name.partition("/")
        found.setdefault(patch, {})[parameter] = tensor
    return found


def asked(lm: LM) -> tuple[list[float], list[str]]:
    prompts, wanted = map(list, zip(*EXPECTED["asked"], strict=True))
    return [score.nll for score in lm.score(prompts, wanted)], lm.generate(prompts, 4)


def answers_as(lm: LM, told: dict[str, Any], tolerance: float = 0.0) -> None:
    """Asserts that the model answers as the version before said: to rounding, or to a tolerance in nats."""
    nll, said = asked(lm)
    assert nll == pytest.approx(told["nll"], rel=1e-5, abs=max(tolerance, 1e-5))
    assert said == told["said"] or tolerance


def changed(lm: LM, plain: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters that have other bits now."""
    now = bits(lm)
    return {n: p.detach() for n, p in lm.model.named_parameters() if n in now and not torch.equal(now[n], plain[n])}


def weights_as(lm: LM, plain: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Asserts that just these parameters have changed, and to these bits."""
    assert same(changed(lm, plain), wanted)


def reknow(*words: str) -> str:
    """Standard output of a command that must succeed."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.stdout


def lines(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8").splitlines()


# --- patches and stacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_gives_the_same_model(models, weights, name):
    told, patch = EXPECTED["patches"][name], Patch.load(f"patches/{name}.patch")
    lm = models[told["model"]]
    plain = bits(lm)
    assert patch.id == told["id"]
    lm.apply(patch)
    try:
        answers_as(lm, told)
        weights_as(lm, plain, weights.get(name, {}))
    finally:
        lm.revert(patch.id)
    assert same(bits(lm), plain)
    answers_as(lm, EXPECTED["models"][told["model"]])


@pytest.mark.parametrize("name", PATCHES)
def test_the_settings_of_a_patch_are_understood(models, name):
    """Whatever the fields are called now: their values are there, and edits come out as they did."""
    told, patch = EXPECTED["patches"][name], Patch.load(f"patches/{name}.patch")
    if patch.method == "qlora" and not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    made = method(patch.method, **patch.settings)
    used = {name: value for name, value in patch.settings.items() if patch.settings.get(f"{name}_absolute") is None}
    assert leaves(used) <= leaves(asdict(made))  # type: ignore[call-overload]
    edited = made.edit(models[told["model"]], patch.edits)
    if patch.method not in MENDED:
        with models[told["model"]].patched(edited):
            answers_as(models[told["model"]], told, AGAIN)


def leaves(value: Any) -> set[float | str]:
    """The numbers and texts in settings."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return set().union(*map(leaves, value))
    return set() if value is None or isinstance(value, bool) else {value}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_opens_as_it_was(models, weights, name):
    told, plain = EXPECTED["patches"][name], bits(models["models/gpt2"])
    lm = LM(f"stacks/{name}")
    assert [patch.id for patch in lm.patches] == told["ids"]
    answers_as(lm, told)
    weights_as(lm, plain, weights.get(name, {}))
    shown = json.loads(reknow("show", f"stacks/{name}", "--json"))
    assert [patch["id"] for patch in shown["patches"]] == told["ids"]
    for number in reversed(range(len(told["ids"]))):
        lm.revert(told["ids"][number])
        assert [patch.id for patch in lm.patches] == told["ids"][:number]
    assert same(bits(lm), plain)


def test_a_memory_is_made_again_without_its_first_version():
    lm = LM("stacks/versions")
    lm.rebuild(without=EXPECTED["patches"]["versions"]["ids"][0])
    (patch,) = lm.patches
    assert patch.edits[0].subject == "Zoe"
    answers_as(lm, EXPECTED["patches"]["versions without the first"], AGAIN)


def test_the_newest_patch_is_taken_out_of_a_stack(tmp_path):
    *ids, newest = EXPECTED["patches"]["mixed"]["ids"]
    stack = str(shutil.copytree("stacks/mixed", tmp_path / "mixed"))
    reknow("revert", newest, "--stack", stack)
    assert [patch.id for patch in LM(stack).patches] == ids


# --- editors -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITORS)
def test_a_training_goes_on(models, name):
    """The one that has ended too: it finds nothing left to do."""
    words, lm = COMMANDS[name], models["models/gpt2"]
    whole = Path("editors", name, "editor.safetensors").read_bytes()
    reknow(*words[: words.index("--out")], "--out", f"editors/{name}")
    assert Path("editors", name, "editor.safetensors").read_bytes() == whole
    reknow(*words)
    assert not Path("interrupted", name, "checkpoint.safetensors").exists()
    steps = [json.loads(line)["step"] for line in lines(f"interrupted/{name}/log.jsonl")]
    assert steps == [json.loads(line)["step"] for line in lines(f"editors/{name}/log.jsonl")]
    patch = Patch.load(f"patches/{name}.patch")
    made = method(name, **{**patch.settings, "editor": f"interrupted/{name}"})
    with lm.patched(made.edit(lm, patch.edits)):
        answers_as(lm, EXPECTED["patches"][name], AGAIN)


# --- runs --------------------------------------------------------------------------------------------------


NEWER = ("match",)
"""Protocols that the version before did not have."""


def numbers(folder: str) -> dict[str, float]:
    """What the report of a run says, but for what depends on the machine, or was not measured then."""
    beside = ("seconds", "peak_memory_mb", "stored_kb")
    with open(f"{folder}/report.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] not in beside and row["protocol"] not in NEWER]
    return {
        "/".join([row["method"], row["stage"], row["metric"], row["protocol"]]): float(row["mean"]) for row in rows
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_reported(name):
    reknow("report", f"finished/{name}")
    assert numbers(f"finished/{name}") == pytest.approx(EXPECTED["means"][name])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on(name):
    """With the rows that it has: none is made again."""
    file = f"interrupted/{name}/cases.jsonl"
    before, wanted = lines(file), len(lines(f"finished/{name}/cases.jsonl"))
    assert len(before) < wanted
    reknow(*COMMANDS[name])
    assert lines(file)[: len(before)] == before and len(lines(file)) == wanted
    assert numbers(f"interrupted/{name}") == pytest.approx(EXPECTED["means"][name], rel=AGAIN, abs=AGAIN)


ROWS = {"trace": "traces.jsonl", "instruct": "scores.jsonl"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_what_else_was_interrupted_goes_on(name):
    words, file = [*COMMANDS[name]], f"interrupted/{name}/{ROWS[name]}"
    if name == "instruct":  # as many cases as every search had when it was written
        words[1:1] = ["--cases", "10"]
    before, whole = lines(file), lines(f"finished/{name}/{ROWS[name]}")
    assert len(before) < len(whole)
    reknow(*words)
    assert lines(file)[: len(before)] == before and len(lines(file)) == len(whole)
    reknow(*words[: words.index("--out")], "--out", f"finished/{name}")
    assert lines(f"finished/{name}/{ROWS[name]}") == whole


def test_losses_of_ices_former_defaults_are_not_mixed_with_those_of_today():
    before = lines("interrupted/convergence/inside.jsonl")
    result = CliRunner().invoke(app, COMMANDS["convergence"])
    assert result.exit_code == 2 and "losses.context_separator is '\\n' and was ' Now: '" in result.output
    assert lines("interrupted/convergence/inside.jsonl") == before


def test_contexts_that_were_written_are_not_asked_for_again():
    from reknow.instructions.llm import LLM, with_contexts

    (edit,) = with_contexts([Edit("{} eats", subject="Zoe", target_new="figs")], LLM("none"), kept="contexts.jsonl")
    assert len(edit.context) == 5 and edit.context[0] == "Zoe has figs at 1."
