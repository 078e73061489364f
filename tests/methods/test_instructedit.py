"""InstructEdit: what stands in front of an edit, how tasks take turns, and its studies."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from conftest import make_lm
from learned import some_cases, trained
from reknow import LM, Case, Edit, InstructEdit, Patch, Probe
from reknow.cli import app
from reknow.errors import InputError
from reknow.instructions import load_families
from reknow.instructions.trial import FamilySplit
from reknow.learning.editors import Editor
from reknow.learning.examples import make_examples
from reknow.learning.gradient_network import make_network, transform_gradients
from reknow.learning.gradients import flat_factors
from reknow.learning.training import Training, interleave
from reknow.model.tokens import Text
from reknow.studies.instructedit.domains import domain_cases, domain_study
from reknow.studies.instructedit.editors import STUDIES, TASKS, Budget, as_trained, run_study
from reknow.studies.instructedit.gradients import gradient_study
from reknow.studies.instructedit.tables import gain

EDIT = Edit("I know {}", subject="Danielle Darrieux", target_new="of")


def same_change(one: Patch, other: Patch) -> bool:
    return all(torch.equal(one.deltas[name].dense(), other.deltas[name].dense()) for name in one.deltas)


# --- the edit -----------------------------------------------------------------------------------------


def test_the_first_instruction_is_taken_where_the_edit_brings_none():
    lm, method = make_lm("gpt2"), trained("instructedit", "gpt2")
    bare = method.edit(lm, [EDIT])
    instructed = replace(EDIT, task="K", instruction="Learn Danielle Darrieux.")
    assert same_change(bare, method.edit(lm, [instructed]))
    assert not same_change(bare, method.edit(lm, [replace(instructed, instruction="Answer.")]))
    assert bare.edits == (EDIT,)


def test_the_change_is_the_networks_for_the_instructed_text():
    lm, method = make_lm("gpt2"), trained("instructedit", "gpt2")
    editor = Editor.load(method.editor)
    settings = InstructEdit(**{**editor.settings, "layers": tuple(editor.settings["layers"])})
    instructed = Text("Task: K\nDescription: Learn Danielle Darrieux.\nInput: I know Danielle Darrieux", "of")
    deltas, _ = transform_gradients(lm, settings, editor.tensors, [instructed])
    patch = method.edit(lm, [EDIT])
    assert deltas.keys() == patch.deltas.keys()
    for name, delta in deltas.items():
        assert torch.allclose(delta.dense(), patch.deltas[name].dense())


def test_an_edit_of_no_task_is_refused():
    lm, method = make_lm("gpt2"), replace(trained("instructedit", "gpt2"), families=None)  # the bundled four
    with pytest.raises(InputError, match="has none: set task to one of counterfact, recent, convsent, zsre"):
        method.edit(lm, [EDIT])
    with pytest.raises(InputError, match="unknown task 'weather'"):
        method.edit(lm, [replace(EDIT, task="weather")])


def test_unit_gradients_make_every_token_count_alike():
    lm = make_lm("gpt2")
    network = make_network(InstructEdit(rank=4, layers=(1,), normalize_gradient=True), lm)
    factors, _ = flat_factors(lm, network.names, lm.encode([Text("I know Peru", "of")]))
    louder = {name: (u, delta * 7) for name, (u, delta) in factors.items()}
    before, after = network(factors), network(louder)
    for name in network.names:
        for side, other in zip(before[name], after[name], strict=True):
            assert torch.allclose(side, other, atol=1e-6)


# --- training -----------------------------------------------------------------------------------------


def test_tasks_take_turns_however_many_cases_they_have():
    many = [Case(Edit(f"a {i}", target_new="x", task="A")) for i in range(50)]
    few = [Case(Edit(f"b {i}", target_new="x", task="B")) for i in range(3)]
    draw = interleave([many, few], Training(batch_size=5))
    drawn = [case.edit for number in range(6) for case in draw(number)]
    assert Counter(edit.task for edit in drawn) == {"A": 15, "B": 15}
    assert len({edit.text for edit in drawn if edit.task == "A"}) == 15
    assert Counter(edit.text for edit in drawn if edit.task == "B") == {f"b {i}": 5 for i in range(3)}
    assert [case.edit for case in draw(3)] == drawn[15:20], "a number always gives the same batch"


def test_instructions_are_drawn_from_those_for_training():
    method, families = InstructEdit(), load_families()
    family = families["recent"]
    case, rng = Case(Edit("{} is", subject="Lima", target_new="x", task="Recent")), random.Random(0)
    instructed = {method.instruct(case, families, rng).edit.instruction for _ in range(200)}
    assert instructed == {text.replace("{}", "Lima") for text in family.texts()}
    bare = replace(method, instructed=False).instruct(family.instruct(case, "Learn it."), families, rng)
    assert bare.edit.instruction is None and bare.edit.text == case.edit.text


def test_an_example_of_an_instructed_edit_is_also_asked_plainly():
    edit = Edit("{} is in", subject="Lima", target_new="Peru", task="T", instruction="Do it.")
    other = Probe("Oslo is in", ("Norway",), "locality", "neighborhood")
    (example,) = make_examples([Case(edit, (other,))], random.Random(0))
    assert example.edit.prompt == "Task: T\nDescription: Do it.\nInput: Lima is in"
    assert [text.prompt for text in example.in_scope] == [example.edit.prompt, "Lima is in"]


def test_an_example_of_convsent_speaks_as_wanted():
    probes = (
        Probe("What of Lima?", ("fine.",), "sentiment", "wanted"),
        Probe("What of Lima?", ("bad.",), "sentiment", "unwanted"),
        Probe("What of Cusco?", ("dull.",), "locality", "other_topic"),
    )
    case = Case(Edit("Be kind about {}.", subject="Lima", target_new="great."), probes)
    (example,) = make_examples([case], random.Random(0))
    assert [(text.prompt, text.target) for text in example.in_scope[1:]] == [("What of Lima?", "fine.")]
    assert [(text.prompt, text.target) for text in example.out_of_scope] == [("What of Cusco?", "dull.")]


def test_the_editor_remembers_whether_it_reads_instructions(tmp_path):
    lm = make_lm("gpt2")
    method = replace(trained("instructedit", "gpt2"), editor=None, instructed=False)
    short = Training(steps=2, batch_size=4, validation=0, validate_every=2)
    plain = method.fit(lm, some_cases(16), tmp_path, short)
    bare = replace(EDIT, task="K")
    instructed = replace(bare, instruction="Answer.")
    asked = replace(plain, instructed=True)  # the field of who asks does not count
    assert same_change(asked.edit(lm, [bare]), asked.edit(lm, [instructed]))


# --- studies ------------------------------------------------------------------------------------------


def test_the_parts_of_a_data_set_are_apart():
    for family in load_families().values():
        parts = FamilySplit.of(family)
        texts = [{case.edit.text for case in part} for part in (parts.test, parts.trial, parts.training)]
        assert len(parts.test) == 50 and len(parts.trial) == 10 and len(parts.training) > 80
        assert texts[2].isdisjoint(texts[0] | texts[1])


def test_the_gain_is_paired_and_a_mean_over_tasks():
    key = "reliability@x"
    values = {
        ("a", "counterfact"): {str(i): {key: 1.0} for i in range(4)},
        ("b", "counterfact"): {str(i): {key: float(i < 2)} for i in range(4)},
        ("a", "zsre"): {"0": {key: 0.5}, "1": {key: 0.5}},
        ("b", "zsre"): {"0": {key: 0.25}, "1": {key: 0.25}},
        ("a", "convsent"): {"0": {"other": 1.0}},
    }
    mean, low, high, tasks = gain(values, "a", "b", key, TASKS)
    assert (mean, tasks) == (pytest.approx((0.5 + 0.25) / 2), 2)
    assert 0.125 <= low < mean < high <= 0.625
    assert gain(values, "a", "b", "nothing", TASKS) is None


def test_an_editor_is_compared_as_it_was_trained():
    found = {"c": {"reliability@teacher_forced_tokens": 0.25, "instructed@teacher_forced_tokens": 1.0}, "d": {}}
    key = "as_trained@teacher_forced_tokens"
    assert as_trained(found, True)["c"][key] == 1.0 and as_trained(found, False)["c"][key] == 0.25
    assert as_trained(found, True)["d"] == {}


def test_domains_are_apart_and_large_enough():
    parts = domain_cases()
    found = [case.edit.id for cases in parts.values() for case in cases]
    assert len(found) == len(set(found)) and min(len(cases) for cases in parts.values()) > 150
    assert "counterfact/0" in {case.edit.id for case in parts["language"]}, "a mother tongue"


@pytest.mark.slow
def test_a_study_of_other_methods_and_one_of_domains(tmp_path, monkeypatch):
    monkeypatch.setitem(STUDIES, "baselines", STUDIES["baselines"]._replace(beside=("ft-l", "ke")))
    lm, budget = LM.demo("gpt2"), Budget(steps=1, batch_size=3, rank=4, test=2)
    text = run_study(lm, "baselines", tmp_path, budget)
    assert all(f"| {name} |" in text for name in ("InstructEdit", "ft-l", "ke"))
    assert (tmp_path / "editors" / "counterfact-recent-convsent-ke-0" / "editor.safetensors").exists()
    text = domain_study(lm, tmp_path, budget)
    assert "| all domains |" in text and "(4 domains)" in text and text == domain_study(lm, tmp_path, budget)


@pytest.mark.slow
def test_a_study_from_training_to_table(tmp_path):
    lm, said = LM.demo("gpt2"), []
    budget = Budget(steps=1, batch_size=3, rank=4, test=2)
    text = run_study(lm, "tasks", tmp_path, budget, say=said.append)
    assert "| multi-task |" in text and "| InstructEdit |" in text and "| single-task |" in text
    header = "| editor | counterfact | recent | convsent | zsre | gain on multi-task |"
    assert header in text and text == (tmp_path / "tasks.md").read_text()
    single = next(line for line in text.splitlines() if line.startswith("| single-task"))
    assert single.split("|")[5].strip() == "–", "no single task is the one held out"
    found = json.loads((tmp_path / "tasks.json").read_text())
    assert set(found["InstructEdit | convsent"]) == {"convsent/0", "convsent/1"}
    names = {path.name for path in (tmp_path / "editors").iterdir()}
    assert "counterfact-recent-convsent-0" in names and "recent-instructed=False-0" in names
    assert run_study(lm, "tasks", tmp_path, budget) == text, "a finished study is only read"
    with pytest.raises(InputError, match="Did you mean 'tasks'"):
        run_study(lm, "task", tmp_path, budget)


@pytest.mark.slow
def test_the_search_on_the_command_line_at_a_real_server(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    server = serve("Write down what is new about {}.\nKeep {} up to date.")
    options = ["--tasks", "recent", "--trial-steps", "1", "--count", "3", "--rounds", "1"]
    options += ["--proposals", "2", "--proposer", "writer"]
    address = f"http://127.0.0.1:{server.http.server_port}/v1"
    command = ["instruct", *options, "--server", address, "--out", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    families = load_families(tmp_path / "instructions.json")
    texts = {each.text for each in families["recent"].instructions}
    assert texts >= {"Write down what is new about {}.", "Keep {} up to date."}
    assert [each.seen for each in families["recent"].instructions] == [True, True, False]
    assert families["recent"].instructions[0].scores.keys() >= {"reliability", "instructed", "locality"}
    assert families["zsre"] == load_families()["zsre"]
    assert "questions" in done.output and "trial edits" in done.output and len(server.asked) == 1
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and "0 trials" in again.output and len(server.asked) == 1
    refused = CliRunner().invoke(app, ["instruct", "--server", address])
    assert refused.exit_code == 2 and "expected --proposer with --server" in refused.output


@pytest.mark.slow
def test_the_figure_of_the_gradients(tmp_path):
    pytest.importorskip("sklearn")
    lines = gradient_study(LM.demo("gpt2"), tmp_path, Budget(steps=1, batch_size=3, rank=4, test=4))
    found = json.loads((tmp_path / "gradients.json").read_text())
    assert found["silhouette"].keys() == {"multi-task", "InstructEdit"}
    assert all(-1 <= value <= 1 for value in found["silhouette"].values())
    assert (tmp_path / "gradients.png").stat().st_size > 10_000 and "gradients.png" in lines[-1]
