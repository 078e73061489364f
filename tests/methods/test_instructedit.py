"""InstructEdit: what stands in front of an edit, and how tasks take turns."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from conftest import make_lm
from learned import some_cases, trained
from reknow import Case, Edit, InstructEdit, Patch, Probe
from reknow.cli import app
from reknow.errors import InputError
from reknow.instructions import load_families
from reknow.learning.editors import Editor
from reknow.learning.examples import make_examples
from reknow.learning.gradient_network import make_network, transform_gradients
from reknow.learning.gradients import flat_factors
from reknow.learning.training import Training, interleave
from reknow.model.tokens import Text

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
