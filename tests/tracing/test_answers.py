"""What stands for an answer of several tokens: all of them, never the first alone."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from conftest import make_lm
from families import tiny_model, tiny_tokenizer
from reknow import FT, LM, Edit
from reknow.cli.app import app
from reknow.evaluation.effect import observe
from reknow.methods.kn import model_answer
from reknow.model.tokens import Text
from reknow.tracing.causal import Tracing, read_answer, trace_prompt
from reknow.tracing.restoration import Prompt, list_restorations

YEAR = Edit("{} was built in", subject="The Eiffel Tower", target_new="1945")
CHARACTER = Edit("{}的首都是", subject="日本", target_new="京都")


def taught(*edits: Edit) -> LM:
    """A tiny model that says the edits' answers; digits and bytes of Han characters are tokens of their own."""
    lm = make_lm("llama")
    lm.apply(FT(layer=2, steps=80, learning_rate=0.05).edit(lm, list(edits)))
    return lm


@pytest.fixture(scope="module")
def knowing() -> LM:
    return taught(YEAR, CHARACTER)


@pytest.mark.parametrize("edit", [YEAR, CHARACTER])
def test_the_model_says_what_it_was_taught(knowing, edit):
    (row,) = knowing.encode([Text.asked(edit)])
    assert len(row.target_ids) > 3
    (score,) = knowing.score([edit.text], [edit.target_new])
    assert score.said and score.rank == 1
    assert knowing.generate(edit.text, len(row.target_ids)).strip() == edit.target_new


@pytest.mark.parametrize(("edit", "other"), [(YEAR, "1999"), (YEAR, "1"), (CHARACTER, "京城"), (YEAR, "1946")])
def test_an_answer_of_which_only_the_first_tokens_come_is_not_first(knowing, edit, other):
    (score,) = knowing.score([edit.text], [other])
    assert score.correct[0] and score.said == (other == "1")
    (answer,) = observe(knowing, [Edit(edit.prompt, subject=edit.subject, target_new=other)]).answers
    assert answer.said == score.said and (answer.rank == 1) == score.said


def test_a_trace_follows_a_number_and_a_character_whole(knowing):
    for edit, answer in ((YEAR, " 1945"), (CHARACTER, "京")):
        assert edit.subject is not None
        found = trace_prompt(knowing, edit.prompt, edit.subject, 0.1, Tracing(samples=2))
        assert found.answer == answer
        (row,) = knowing.encode([Text.about(edit)])
        prompt = knowing.encode([Text(edit.text)])[0].ids
        with torch.no_grad():
            chances = knowing.model(torch.tensor([row.ids])).logits[0].softmax(-1)
        count = len(knowing.encode([Text(edit.text, answer)])[0].target_ids)
        each = [float(chances[len(prompt) - 1 + i, row.target_ids[i]]) for i in range(count)]
        assert found.clean == pytest.approx(math.prod(each), rel=1e-4) and count > 1
        assert found.restored["hidden"].shape == (len(prompt), knowing.layers)


def test_an_ordinary_answer_is_its_first_token_as_in_the_paper():
    lm = make_lm("gpt2")
    for prompt in ("The mother tongue of Danielle Darrieux is", "Beats Music is owned by", "The capital of"):
        (row,) = lm.encode([Text(prompt)])
        with torch.no_grad():
            first = int(lm.model(torch.tensor([row.ids])).logits[0, -1].argmax())
        shown = lm.tokenizer.decode([first])
        if shown.strip() and not shown.strip().isdigit() and "\ufffd" not in shown:
            assert read_answer(lm, row) == [first]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt"])
def test_a_climb_gives_what_full_passes_give_for_answers_of_several_tokens(family):
    lm = LM((tiny_model(family), tiny_tokenizer()))
    (row,) = lm.encode([Text.of("The home of {} is", "Danielle Darrieux")])
    noise = torch.randn(3, row.subject_last + 1 - row.subject_first, 32, generator=torch.Generator().manual_seed(0))
    said = lm.encode([Text("x", "1945")])[0].target_ids
    prompt = Prompt(lm, row, noise, said)
    runs = [run for kind in ("hidden", "mlp", "attention_severed") for run in list_restorations(kind, lm.layers, 2)]
    for column, chances in prompt.restored([0, row.subject_first, row.subject_last, prompt.width - 1], runs):
        expected = [prompt.run_full_pass(column, run) for run in runs]
        assert chances == pytest.approx(expected, rel=2e-3, abs=1e-12)
    (clean,) = lm.score(["The home of Danielle Darrieux is"], ["1945"])
    assert prompt.probability == pytest.approx(math.exp(-clean.nll * len(said)), rel=1e-4)


@pytest.mark.slow
def test_the_command_counts_whole_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["edit", "The twin city of {Rabat} is", "Damon", "--true", "Damascus", "--method", "ft-m", "--layer", "0"]
    shown = CliRunner().invoke(app, [*asked, "--set", "steps=1", "--out", "d.patch"])
    assert shown.exit_code == 0 and "the new answer comes first in 0 of 1 prompts" in shown.stdout
    told = json.loads(CliRunner().invoke(app, [*asked, "--set", "steps=1", "--out", "e.patch", "--json"]).stdout)
    assert told["after"]["answers"][0]["said"] is False and told["after"]["answers"][0]["rank"] > 1


def test_the_old_answer_of_knowledge_neurons_is_a_whole_number_or_character(knowing):
    (year,) = knowing.encode([Text.asked(YEAR)])
    assert knowing.tokenizer.decode(year.target_ids[:3]) != " 1945"
    assert model_answer(knowing, YEAR.text) == "1945" and model_answer(knowing, CHARACTER.text) == "京"
