"""The command line as a user meets it: what it writes, what it refuses, and with which words and status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conftest import make_lm, saved
from reknow import GRACE, LM, METHODS, Patch, UltraEdit, cli
from reknow.checks.reading import read_value
from reknow.cli import app
from reknow.cli.places import run_folder
from reknow.cli.settings import build_method, field_docs
from reknow.cli.training import _for_model, choose_method
from reknow.editing.layer_choice import LayerScore, write_scores
from reknow.registry import FAMILIES

PROMPT = "The mother tongue of {Danielle Darrieux} is"
QUICK = ["--set", "steps=3", "--set", "covariance_tokens=0", "--set", "context_groups=[]", "--layer", "1"]
IDS = torch.tensor([[10, 40, 80, 120, 200]])


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A tiny random model in a folder."""
    return saved(tmp_path_factory.mktemp("model"), "gpt2")


pytestmark = pytest.mark.usefixtures("empty_folder")


def reknow(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def done(*arguments: object) -> str:
    """Standard output of a command that must succeed."""
    result = reknow(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def edit(model: str, *arguments: object, prompt: str = PROMPT, target: str = "English") -> str:
    return done("edit", prompt, target, "--model", model, *QUICK, *arguments)


# --- the round trip ------------------------------------------------------------------------------------------


def test_edit_apply_revert_export(model, empty_folder):
    shown = edit(model, "--true", "French")
    assert "every bit as before" in shown and "rank of its worst token" in shown and "“French”" in shown
    patch = Patch.load("danielle-darrieux.patch")
    done("apply", "danielle-darrieux.patch", "--stack", "mine", "--model", model)
    lm = LM("mine")
    assert [p.id for p in lm.patches] == [patch.id]

    done("export", "mine", "whole", "--to", "hf")
    assert torch.equal(AutoModelForCausalLM.from_pretrained("whole")(IDS).logits, lm.model(IDS).logits)
    done("export", "danielle-darrieux.patch", "adapter", "--to", "lora", "--model", model)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), "adapter")
    assert torch.allclose(adapted(IDS).logits, lm.model(IDS).logits, atol=1e-4)

    done("revert", patch.id, "--stack", "mine")
    assert torch.equal(LM("mine").model(IDS).logits, LM(model).model(IDS).logits)


def test_braces_and_a_subject_by_itself_are_the_same_edit(model):
    edit(model, "--subject", "Danielle Darrieux")
    (made,) = Patch.load("danielle-darrieux.patch").edits
    assert made.text == "The mother tongue of Danielle Darrieux is"


def test_a_second_patch_is_made_on_the_stack_and_the_first_comes_off(model):
    edit(model, "--out", "first.patch")
    done("apply", "first.patch", "--stack", "mine", "--model", model)
    hint = edit("mine", "--out", "second.patch", prompt="The capital of {Peru} is", target="Paris")
    assert "apply it with: reknow apply second.patch --stack mine\n" in hint
    first, second = Patch.load("first.patch"), Patch.load("second.patch")
    assert second.made_on == (first.id,)
    assert_refused(reknow("apply", "second.patch", "--stack", "mine", "--model", "demo:gpt2"), model)
    done("apply", "second.patch", "--stack", "mine", "--model", os.path.relpath(model))
    result = reknow("revert", "first.patch", "--stack", "mine")
    assert result.exit_code == 0 and "made on top of" in result.stderr
    found = json.loads(done("show", "mine", "--json"))
    assert [p["id"] for p in found["patches"]] == [second.id]


@pytest.mark.slow
def test_a_memory_says_what_it_replaces_and_is_rebuilt_without_it(model):
    quick = "--method", "grace", "--layer", "1", "--set", "steps=3"
    done("edit", PROMPT, "English", "--model", model, *quick, "--out", "first.patch")
    done("apply", "first.patch", "--stack", "mine", "--model", model)
    again = "edit", PROMPT, "Dutch", "--model", "mine", *quick
    said = done(*again, "--out", "second.patch")
    told = "takes the place of a stored edit: The mother tongue of Danielle Darrieux is → English"
    assert told in said and told in done("show", "second.patch")
    refused = reknow(*again, "--set", "conflict=refuse", "--out", "third.patch")
    assert refused.exit_code == 2 and "stored as 'English', got 'Dutch'" in refused.stderr
    done("apply", "second.patch", "--stack", "mine")
    assert "--rebuild" in reknow("revert", "first.patch", "--stack", "mine").stderr
    done("revert", "first.patch", "--stack", "mine", "--rebuild")
    (patch,) = LM("mine").patches
    assert patch.edits[0].target_new == "Dutch" and patch.follows is None


def test_merge_show_and_diff(model):
    edit(model, "--out", "a.patch")
    edit(model, "--out", "b.patch", prompt="The capital of {Peru} is", target="Paris")
    done("merge", "a.patch", "b.patch", "--out", "both.patch")
    assert [e.target_new for e in Patch.load("both.patch").edits] == ["English", "Paris"]
    found = json.loads(done("show", "a.patch", "--json"))
    (matrix,) = found["matrices"].values()
    assert matrix["rank"] == 1 and found["method"] == "rome" and found["edits"][0]["subject"] == "Danielle Darrieux"
    found = json.loads(done("diff", "a.patch", "both.patch", "--json"))
    assert found["same_base"] and [e["target_new"] for e in found["edits_only_b"]] == ["Paris"]
    assert "only in both.patch: The capital of Peru is → Paris" in done("diff", "a.patch", "both.patch")


def test_edits_of_a_file_become_one_patch(model, empty_folder):
    rows = [
        {"prompt": PROMPT, "target_new": "English"},
        {"prompt": "The capital of {Peru} is", "target_new": "Paris"},
    ]
    (empty_folder / "edits.json").write_text(json.dumps(rows))
    found = json.loads(done("edit", "--file", "edits.json", "--model", model, *QUICK, "--json"))
    assert found["file"] == "danielle-darrieux-and-1-more.patch" and len(found["after"]["answers"]) == 2
    assert len(Patch.load(found["file"]).edits) == 2


def test_a_fine_tuning_patch_needs_truncation_for_an_adapter(model):
    shown = ["--method", "ft-m", "--set", "steps=3", "--layer", "1", "--out", "ft.patch"]
    done("edit", PROMPT, "English", "--model", model, *shown)
    command = ["export", "ft.patch", "adapter", "--to", "lora", "--model", model, "--max-rank", "2"]
    assert_refused(reknow(*command), "rank 2")
    assert "reliability (teacher-forced, exact)" in done(*command, "--truncate")


# --- nothing is written that was not asked for -----------------------------------------------------------------


def test_plan_writes_nothing(model, empty_folder):
    shown = done("edit", PROMPT, "English", "--model", model, "--plan")
    assert "transformer.h.0.mlp.c_proj" in shown and "gradient descent" in shown
    cost = json.loads(done("edit", PROMPT, "English", "--model", model, "--plan", "--json", "--layer", "2"))
    assert cost["layers"] == [2] and {step["what"] for step in cost["steps"]} >= {"covariance of the keys"}
    lm, plan = LM(model), ["--model", model, "--plan", "--json", "--method"]
    for method in (UltraEdit(), GRACE()):  # which choose by themselves
        cost = json.loads(done("edit", PROMPT, "English", *plan, method.name))
        assert cost["layers"] == method.footprint(lm).layers and not cost["guessed"]
    assert [step["what"] for step in json.loads(done("edit", PROMPT, "English", *plan, "ultraedit"))["steps"]] == [
        "gradient of the edits",
        "its transform",
    ]
    assert_refused(reknow("edit", PROMPT, "English", *plan, "mend"), "needs an editor")
    assert list(empty_folder.iterdir()) == []


def test_a_second_run_refuses_to_overwrite(model, empty_folder):
    edit(model)
    before = (empty_folder / "danielle-darrieux.patch").read_bytes()
    assert_refused(
        reknow("edit", PROMPT, "French", "--model", model, *QUICK), "danielle-darrieux.patch exists", "--force"
    )
    assert (empty_folder / "danielle-darrieux.patch").read_bytes() == before
    edit(model, "--force", target="French")
    assert Patch.load("danielle-darrieux.patch").edits[0].target_new == "French"


def assert_refused(result, *words: str) -> None:
    """One line on stderr with these words, status 2, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


BAD = {
    "subject not in the prompt": (["edit", "The capital is", "Rome", "--subject", "Peru"], ["'Peru'", "braces"]),
    "empty target": (["edit", PROMPT, " "], ["target_new"]),
    "no edit": (["edit"], ["--file"]),
    "no subject for a method that needs one": (
        ["edit", "The capital is", "Rome", "--layer", "1"],
        ["needs a subject"],
    ),
    "unknown method": (["edit", PROMPT, "English", "--method", "rom"], ["Did you mean 'rome'"]),
    "unknown setting": (["edit", PROMPT, "English", "--set", "stepz=3"], ["Did you mean 'steps'"]),
    "a setting of another type": (["edit", PROMPT, "English", "--set", "steps=many"], ["steps as int"]),
    "a setting that is no number": (["edit", PROMPT, "English", "--set", "learning_rate=NaN"], ["got 'NaN'"]),
    "a setting without value": (["edit", PROMPT, "English", "--set", "steps"], ["FIELD=VALUE"]),
    "no such layer": (["edit", PROMPT, "English", "--layer", "9"], ["0 to 2"]),
    "unknown dtype": (["edit", PROMPT, "English", "--dtype", "float23"], ["Did you mean"]),
    "malformed JSON": (["edit", "--file", "broken.json"], ["broken.json, line 2"]),
    "a field missing": (["edit", "--file", "missing.json"], ["target_new"]),
    "no such patch": (["show", "nowhere.patch"], ["nowhere.patch"]),
    "no patch": (["apply", "broken.json", "--stack", "s"], ["broken.json"]),
    "no stack": (["revert", "abc", "--stack", "nowhere"], ["stack folder"]),
    "unknown format": (["export", "x", "y", "--to", "ggml"], ["hf", "gguf"]),
    "no seed": (["bench", "--seeds", ",", "--limit", "1"], ["at least one seed"]),
    "a seed twice": (["bench", "--seeds", "0,0", "--limit", "1"], ["each once"]),
    "a seed of a study twice": (["study", "tasks", "--seeds", "1,1"], ["each once"]),
    "updates where nothing is trained": (["study", "zsre", "--steps", "3"], ["zsre alone", "--steps"]),
    "unknown study": (["study", "domain"], ["Did you mean 'domains'", "gradients"]),
    "families where none are read": (["study", "domains", "--families", "broken.json"], ["--families"]),
    "a family missing": (["study", "tasks", "--families", "families.json"], ["families.json", "no counterfact"]),
    "unknown method to explain": (["methods", "mendd"], ["method 'mendd'"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(name, model, empty_folder):
    command, words = BAD[name]
    (empty_folder / "broken.json").write_text('[{"prompt": "a",\n "target_new" "b"}]')
    (empty_folder / "missing.json").write_text('[{"prompt": "The capital of {Peru} is"}]')
    (empty_folder / "families.json").write_text('{"families": {}}')
    before = sorted(empty_folder.iterdir())
    takes_model = command[0] in ("edit", "apply")
    assert_refused(reknow(*command, *(["--model", model] if takes_model else [])), *words)
    assert sorted(empty_folder.iterdir()) == before


def test_models_that_cannot_be_edited_are_refused(tmp_path, empty_folder):
    assert_refused(reknow("edit", PROMPT, "English", "--model", "demo:gtp2"), "demo model 'gtp2'")
    assert_refused(reknow("edit", PROMPT, "English", "--model", "./nowhere"), "./nowhere")
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    assert_refused(reknow("edit", PROMPT, "English", "--model", tmp_path / "t5"), "an encoder-decoder (t5)")
    assert list(empty_folder.iterdir()) == []


def test_a_patch_of_another_base_is_refused(model, tmp_path, empty_folder):
    edit(model)
    other = saved(tmp_path / "other", "gpt2", seed=1)
    result = reknow("apply", "danielle-darrieux.patch", "--stack", "mine", "--model", other)
    assert_refused(result, "other weights")
    assert not (empty_folder / "mine").exists()


def test_nan_during_optimisation_writes_nothing(model, empty_folder):
    wild = ["--method", "ft-m", "--layer", "1", "--set", "learning_rate=1e25", "--set", "steps=5"]
    assert_refused(reknow("edit", PROMPT, "English", "--model", model, *wild), "NaN", "lower learning_rate")
    assert list(empty_folder.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file(model, empty_folder, monkeypatch):
    edit(model)
    before = (empty_folder / "danielle-darrieux.patch").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    result = reknow("edit", PROMPT, "French", "--model", model, *QUICK, "--force")
    assert_refused(result, "No space left on device")
    assert [path.name for path in empty_folder.iterdir()] == ["danielle-darrieux.patch"]
    assert (empty_folder / "danielle-darrieux.patch").read_bytes() == before


# --- the program itself ------------------------------------------------------------------------------------------


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(cli.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("from reknow.cli import main; main()", *arguments)


def test_help_does_not_wait_for_torch():
    code = "import sys; import reknow.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert python(code).stdout == "False False\n"


@pytest.mark.slow
def test_status_and_streams_of_the_program():
    assert program("--version").stdout.startswith("reknow ")
    refused = program("edit", "The capital is", "Rome", "--subject", "Peru")
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1
    assert "Traceback" not in refused.stderr
    assert "Traceback" in program("show", "nowhere.patch", "--debug").stderr
    unknown = program("edlt")
    assert unknown.returncode == 2 and "No such command" in unknown.stderr


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_130(model):
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "from reknow.methods.rome import ROME\n"
        "ROME.edit = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "from reknow.cli import main; main()"
    )
    result = python(code, "edit", PROMPT, "English", "--model", model)
    assert result.returncode == 130 and result.stderr.splitlines()[-1].startswith("stopped: ")
    assert "Traceback" not in result.stderr and os.listdir() == []


# --- settings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    rate: float = 1.0
    """How fast:
    in steps."""
    undocumented: int = 0


def test_field_docs_reads_the_docstring_under_a_field():
    assert field_docs(Example) == {"rate": "How fast: in steps."}


def test_every_setting_of_every_method_is_explained():
    for name, entry in METHODS.items():
        assert set(field_docs(entry.method)) == {field.name for field in fields(entry.method)}, name
        assert METHODS[name].paper in done("methods", name)
        for field, doc in field_docs(entry.method).items():
            fragment = re.match(r"(Of|That|The same|Such|Those|It|In that)\b", doc)
            assert doc.endswith((".", ".)")) and not fragment, f"{name}.{field}: {doc}"


def test_methods_are_listed_by_family_with_what_they_need():
    listed = done("methods").splitlines()
    rows = {line.split()[0]: line.split()[-3:] for line in listed if line.split()[:1] and line.split()[0] in METHODS}
    assert [name for methods in FAMILIES.values() for name in methods] == list(rows)
    assert set(rows) == set(METHODS)
    assert rows["rome"] == ["yes", "–", "yes"] and rows["grace"] == ["–", "–", "no"]
    assert rows["serac"] == ["–", "yes", "no"] and rows["mend"] == ["–", "yes", "yes"]


def test_every_command_stands_in_a_group():
    shown = done("--help")
    assert re.findall(r"^╭─ (.*?) ─", shown, re.MULTILINE) == [
        "Options", "Edit", "Keep and take back", "Prove", "Deploy", "Research"
    ]  # fmt: skip


def test_published_settings_are_shown_and_taken(model, empty_folder):
    shown = done("methods", "rome-paper")
    assert "kmeng01/rome" in shown and "layer=17" in shown
    assert "layer=17" not in done("methods", "rome-paper:gpt-j-6b")
    edit(model, "--method", "rome-paper:gpt2-xl", "--out", "xl.patch")
    patch = Patch.load("xl.patch")
    assert (patch.method, patch.settings["units"], patch.settings["layer"]) == ("rome", "absolute", 1)
    refused = reknow("edit", PROMPT, "English", "--model", model, "--method", "rome-paper")
    assert refused.exit_code == 2 and "which are gpt2-medium" in refused.stderr
    assert [path.name for path in empty_folder.iterdir()] == ["xl.patch"]


def test_a_method_that_learns_takes_the_papers_training():
    chosen, values = choose_method("mend-paper", ["steps=7", "rank=4"])
    learned, training = _for_model(chosen, values, make_lm())
    assert (learned.rank, learned.locality_tokens, learned.name) == (4, "all", "mend")
    assert (training.steps, training.micro_batches, training.clip_norm) == (7, 10, 100.0)


def test_settings_are_read_by_their_type():
    method = build_method("rome", ["steps=7", "learning_rate=1", "context_groups=[[2, 3]]", "layer=auto"])
    assert (method.steps, method.learning_rate, method.context_groups, method.layer) == (7, 1.0, ((2, 3),), None)
    assert isinstance(method.learning_rate, float)
    assert build_method("ft-m", ["clamp=none"]).clamp is None
    assert read_value("name", "12", str) == "12"
    assert build_method("rome", ["average_keys=True"]).average_keys


def test_the_layer_goes_to_whichever_field_a_method_has():
    assert build_method("rome", layer="2").layer == 2 and build_method("rome", layer="auto").layer is None
    assert build_method("ft-m", layer="1,2").layer == (1, 2)
    assert build_method("ice", layer="1").layers == (1,)


# --- statistics ------------------------------------------------------------------------------------------------


def test_statistics_are_read_ahead_and_then_found(model, empty_folder, monkeypatch):
    monkeypatch.setenv("REKNOW_CACHE", "cache")
    Path("text.txt").write_text("Paris is in France .\n\nLima is in Peru .\n" * 9, encoding="utf-8")
    rest = ["--set", "steps=3", "--set", "context_groups=[]", "--layer", "1", "--model", model, "--no-stats"]
    own = ["--set", "covariance_text=text.txt", "--set", "covariance_tokens=50"]
    refused = reknow("edit", PROMPT, "English", *rest, *own)
    assert refused.exit_code == 2 and "run reknow stats --layers 1 first" in " ".join(refused.stderr.split())
    text = ["--text", "text.txt", "--tokens", 50]
    made = json.loads(done("stats", "--model", model, "--layers", "1,2", *text, "--json"))
    assert [row["layer"] for row in made] == [1, 2] and all(row["tokens"] == 50 for row in made)
    assert all(Path(row["file"]).is_file() and 1 <= row["rank"] <= row["size"] for row in made)
    done("edit", PROMPT, "English", *rest, *own)
    assert "effective rank" in done("stats", "--model", model, "--layers", "all", *text)
    for wrong, complaint in (("x", "whole numbers"), ("7", "layer from 0 to 2")):
        result = reknow("stats", "--model", model, "--layers", wrong)
        assert result.exit_code == 2 and complaint in " ".join(result.stderr.split())


def test_layers_are_handed_on_from_file_to_file(model, empty_folder, monkeypatch):
    monkeypatch.setenv("REKNOW_CACHE", "cache")
    assert "layer 0 as before: " in done("layers", model, "--out", "none.json")  # it knows nothing
    assert not Path("none.json").exists() and not Path("cache").exists()
    assert json.loads(done("edit", PROMPT, "English", "--model", model, "--plan", "--json"))["guessed"]
    write_scores(LM(str(model)), [LayerScore(0, 0.1, 0.5, 0.5, 0.5), LayerScore(1, 0.0, 1, 1, 1)], Path("one.json"))
    assert "layer 1: kept for" in done("layers", model, "--from", "one.json")
    cost = json.loads(done("edit", PROMPT, "English", "--model", model, "--plan", "--json"))
    assert (cost["layers"], cost["guessed"]) == ([1], False)
    for wrong in (["--from", "one.json", "--out", "two.json"], ["--from", "nowhere.json"]):
        assert reknow("layers", model, *wrong).exit_code == 2


def test_models_have_run_folders_of_their_own():
    assert [str(run_folder("demo", model)) for model in ("demo:gpt2", "demo:llama", "me/small/")] == [
        "runs/demo",
        "runs/demo-llama",
        "runs/demo-small",
    ]
