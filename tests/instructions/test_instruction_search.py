"""The search for instructions: files, proposers, scores, and what a kill or a bad proposer leaves."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from reknow import Case, Edit
from reknow.errors import InputError
from reknow.files.llm import LLM
from reknow.instructions import Family, Instruction, Rewriter, Search, Writer, family_of, load_families, save_families
from reknow.instructions import search as run_search
from reknow.instructions.propose import instruction_question, is_usable
from reknow.instructions.search import difference
from serving_process import serving

FAMILY = Family("recent", "Recent", "wiki_recent", "New facts.", instructions=(Instruction("Add a fact about it."),))
SMALL = Search(count=4, proposals=3, rounds=4)


def by_length(family, text):
    """A score without a model: the longer, the better, up to ten words."""
    share = min(len(text.split()), 10) / 10
    return {"reliability": [share - 0.1, share + 0.1], "locality": [0.5, None]}


# --- files --------------------------------------------------------------------------------------------


def test_the_bundled_families_are_whole():
    families = load_families()
    assert list(families) == ["counterfact", "recent", "convsent", "zsre"]
    for family in families.values():
        assert all(is_usable(each.text) for each in family.instructions)


def test_families_are_read_as_they_were_written(tmp_path):
    families = [replace(family, input="Q: {prompt}") for family in load_families().values()]
    path = tmp_path / "mine.json"
    save_families(path, families, {"licence": "CC0"})
    assert list(load_families(path).values()) == families


def test_an_edit_goes_behind_its_instruction():
    family = replace(FAMILY, input="Q: {prompt}", target="{target}.")
    case = family.instruct(Case(Edit("{} is in", subject="Lima", target_new="Peru")), "Learn where {} is.")
    assert (case.edit.task, case.edit.instruction) == ("Recent", "Learn where Lima is.")
    assert (case.edit.text, case.edit.target_new) == ("Q: Lima is in", "Peru.")
    assert case.edit.instructed(case.edit.text) == (
        "Task: Recent\nDescription: Learn where Lima is.\nInput: Q: Lima is in"
    )
    own, instructed = case.questions
    assert (own.kind, own.prompt) == ("reliability", "Q: Lima is in")
    assert (instructed.kind, instructed.prompt) == ("instructed", case.edit.instructed("Q: Lima is in"))
    assert Edit("a", target_new="b").instructed("c") == "c"


def test_a_task_without_instruction_is_refused(tmp_path):
    empty = replace(FAMILY, instructions=())
    with pytest.raises(InputError, match="expected an instruction for the task 'recent'; got none: add one"):
        empty.texts()
    with pytest.raises(InputError, match="expected an unseen instruction"):
        FAMILY.texts(seen=False)
    with pytest.raises(InputError, match="'recent'"):
        run_search([empty], Rewriter(), by_length, tmp_path, SMALL)
    assert not list(tmp_path.iterdir())


def test_the_task_of_an_edit():
    families = {"recent": FAMILY}
    for task in ("recent", "Recent"):
        assert family_of(Edit("a", target_new="b", task=task), families) is FAMILY
    assert family_of(Edit("a", target_new="b"), families) is FAMILY, "there is no other"
    families["other"] = replace(FAMILY, name="other", title="Other", data="zsre")
    assert family_of(Edit("a", target_new="b", id="wiki_recent/3"), families) is FAMILY
    with pytest.raises(InputError, match="has none: set task to one of recent, other"):
        family_of(Edit("a", target_new="b"), families)
    with pytest.raises(InputError, match=r"Did you mean .recent."):
        family_of(Edit("a", target_new="b", task="resent"), families)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "expected JSON"),
        ('{"card": {}}', "field 'families': expected this field"),
        (
            '{"families": {"a": {"title": "A", "target": "{target}", "input": "x"}}}',
            "expected a template with {prompt}",
        ),
        (
            '{"families": {"a": {"title": "A", "input": "{prompt}", "target": "{target}", "instructions": ["x"]}}}',
            "instructions",
        ),
    ],
)
def test_a_broken_file_is_refused_with_its_field(tmp_path, content, complaint):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_families(path)
    assert complaint in str(caught.value) and "mine.json" in str(caught.value)


# --- the rewriter -------------------------------------------------------------------------------------


def test_the_rewriter_is_seeded_and_never_repeats_itself():
    first = Rewriter().propose(FAMILY, FAMILY.instructions, 5, 1)
    assert first == Rewriter().propose(FAMILY, FAMILY.instructions, 5, 1) and len(set(first)) == 5
    assert first != Rewriter(seed=1).propose(FAMILY, FAMILY.instructions, 5, 1)
    scored = [Instruction(text) for text in first]
    second = Rewriter().propose(FAMILY, scored, 5, 1)
    assert not set(first) & set(second) and all(map(is_usable, first + second))


def test_the_rewriter_varies_what_scored_best():
    bank = {
        "forms": ["{opening} {goal}; {limit}."],
        "openings": [f"opening {i} x" for i in range(9)],
        "goals": {"any": [f"goal {i}" for i in range(9)]},
        "limits": [f"limit {i}" for i in range(9)],
    }
    best = Instruction("Opening 3 x goal 4; limit 5.")
    proposed = Rewriter(bank=bank).propose(FAMILY, [best], 4, 1)
    kept = [sum(part in text for part in ("pening 3", "goal 4", "limit 5")) for text in proposed]
    assert kept[:2] == [2, 2]


# --- the search ---------------------------------------------------------------------------------------


def test_the_best_are_kept_and_one_of_them_is_unseen(tmp_path):
    found = run_search([FAMILY], Rewriter(), by_length, tmp_path, SMALL)
    (family,) = found.families
    assert [each.seen for each in family.instructions] == [True, True, True, False]
    logged = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    scores = sorted((row["scores"]["reliability"] for row in logged), reverse=True)
    assert sorted((each.scores["reliability"] for each in family.instructions), reverse=True) == scores[:4]
    assert found.cost["trials"] == len(logged) == len({row["text"] for row in logged})
    assert found.stopped == {"recent": "no metric rose"}
    assert logged[0]["text"] == FAMILY.instructions[0].text


def test_it_goes_on_while_a_metric_rises(tmp_path):
    risen = iter(range(1000))
    found = run_search([FAMILY], Rewriter(), lambda *_: {"reliability": [next(risen) / 100]}, tmp_path, SMALL)
    assert found.stopped == {"recent": "4 rounds were made"} and found.cost["trials"] == 1 + 4 * 3


def test_without_a_round_what_is_there_is_scored_and_left_in_its_order(tmp_path):
    texts = ("Add it.", "Add a new fact about it to what is known.", "Keep what is no fact about it.")
    given = replace(FAMILY, instructions=tuple(Instruction(text, text != texts[1]) for text in texts))
    found = run_search([given], Rewriter(), by_length, tmp_path, replace(SMALL, count=2, rounds=0))
    (family,) = found.families
    assert [(each.text, each.seen) for each in family.instructions] == [
        (each.text, each.seen) for each in given.instructions
    ]
    assert [each.scores["reliability"] for each in family.instructions] == [0.2, 1.0, 0.7]
    assert set(found.behind["recent"]) == {texts[0], texts[2]} and found.stopped == {"recent": "no rounds were made"}
    again = run_search([given], Rewriter(), by_length, tmp_path, replace(SMALL, count=2, rounds=0))
    assert again.families == found.families and again.cost["trials"] == 0


def test_ranks_are_said_with_what_the_cases_tell():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.3, 40)  # what is hard with one instruction is hard with another: taken out by pairing
    good, bad = {"reliability": [*(0.7 + noise)]}, {"reliability": [*(0.6 + noise + rng.normal(0, 0.05, 40))]}
    found = difference(good, bad)
    assert found.low and found.high and 0 < found.low < 0.1 < found.high < 0.13 and found.cases == 40
    alone = difference({"reliability": good["reliability"][:2]}, {"reliability": bad["reliability"][1:3]})
    assert alone.low and alone.high and alone.low < 0 < alone.high, "two cases, not paired, tell nothing apart"
    few = difference({"a": [1.0, None], "b": [0.0, 0.5]}, {"a": [0.0, None], "b": [0.0, 0.5]})
    assert few.mean == pytest.approx(0.5), "the mean over metrics, of the cases that have them"


def test_a_search_says_how_far_each_is_behind_the_best(tmp_path):
    found = run_search([FAMILY], Rewriter(), by_length, tmp_path, SMALL)
    (family,) = found.families
    best = max(family.instructions, key=lambda each: sum(each.scores.values()))
    behind = found.behind["recent"]
    assert set(behind) == {each.text for each in family.instructions} - {best.text}
    for each in family.instructions:
        if each.text in behind:
            expected = (best.scores["reliability"] - each.scores["reliability"]) / 2
            assert behind[each.text].mean == behind[each.text].low == pytest.approx(expected)


KILLED = """
import os, signal, sys
from test_instruction_search import FAMILY, SMALL, by_length, run_search, Rewriter
calls = []
def score(family, text):
    calls.append(text)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return by_length(family, text)
run_search([FAMILY], Rewriter(), score, sys.argv[1], SMALL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_killed_search_goes_on_and_ends_the_same(tmp_path, at):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(at)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    whole = run_search([FAMILY], Rewriter(), by_length, tmp_path / "whole", SMALL)
    resumed = run_search([FAMILY], Rewriter(), by_length, tmp_path / "killed", SMALL)
    assert resumed.families == whole.families and resumed.stopped == whole.stopped
    assert resumed.cost["trials"] == whole.cost["trials"] - (at - 1)
    again = run_search([FAMILY], Rewriter(), by_length, tmp_path / "killed", SMALL)
    assert again.families == whole.families and again.cost["trials"] == 0


def test_a_folder_of_another_search_is_refused(tmp_path):
    run_search([FAMILY], Rewriter(), by_length, tmp_path, SMALL, about={"model": "a"})
    with pytest.raises(InputError, match="model is 'b' and was 'a'"):
        run_search([FAMILY], Rewriter(), by_length, tmp_path, SMALL, about={"model": "b"})


def test_scores_of_another_task_of_the_same_name_are_not_taken_over(tmp_path):
    run_search([FAMILY], Rewriter(), by_length, tmp_path, SMALL)
    for other, said in (
        (replace(FAMILY, data="zsre"), "data is 'zsre'"),
        (replace(FAMILY, input="Q: {prompt}"), "input"),
    ):
        with pytest.raises(InputError, match=said):
            run_search([other], Rewriter(), by_length, tmp_path, SMALL)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["settings"]["tasks"]  # of an earlier version
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert run_search([FAMILY], Rewriter(), by_length, tmp_path, SMALL).cost["trials"] == 0


# --- a language model at a real server ----------------------------------------------------------------

LINES = (
    "1. Write the newest fact about {} into the model.\n2) Learn what is new.\n- Keep the rest as it was before.\n"
)


def test_a_chat_server_is_told_the_task_and_the_scores(serve, tmp_path):
    server = serve(LINES, "Take over the latest record about {} from the base.")
    writer = Writer(server.llm())
    found = run_search([FAMILY], writer, by_length, tmp_path, replace(SMALL, count=5, rounds=2))
    texts = {each.text for each in found.families[0].instructions}
    assert "Write the newest fact about {} into the model." in texts and "Learn what is new." in texts
    asked = [body["messages"][0]["content"] for _, _, body in server.asked]
    assert len(asked) == 2 == found.cost["questions"] and found.cost["words sent and received"] > 50
    assert "Task: Recent. New facts." in asked[0] and "- Add a fact about it. (reliability 50 %" in asked[0]
    assert asked[1].index("Write the newest fact") < asked[1].index("Add a fact about it.")  # the best one first
    assert asked[0] == instruction_question(
        FAMILY, [Instruction(FAMILY.instructions[0].text, True, {"reliability": 0.5, "locality": 0.5})], 3
    )


def test_nonsense_is_asked_again_and_then_counts(serve, tmp_path):
    server = serve("I cannot help with that", LINES, LINES)
    found = run_search([FAMILY], Writer(server.llm()), by_length, tmp_path, replace(SMALL, rounds=1))
    assert len(found.families[0].instructions) == 4 and len(server.asked) == 2


@pytest.mark.parametrize("fault", [None, 500, "?!", "raw:{}"])
def test_a_proposer_that_fails_loses_nothing(serve, tmp_path, caplog, fault):
    server = serve(LINES, fault)
    with caplog.at_level(logging.WARNING):
        found = run_search([FAMILY], Writer(server.llm()), by_length, tmp_path, replace(SMALL, count=5))
    (family,) = found.families
    assert len(family.instructions) == 4 and found.stopped == {"recent": "the proposer gave no answer"}
    assert "got none in 2 tries" in caplog.text and "4 instructions of 5 wanted" in caplog.text
    # Later, with a server that works, the same folder goes on from there.
    server.answers[:] = ["Bring what is known about {} up to date."]
    again = run_search([FAMILY], Writer(server.llm()), by_length, tmp_path, replace(SMALL, count=5))
    assert len(again.families[0].instructions) == 5


@pytest.mark.slow
@pytest.mark.real
def test_a_real_model_at_our_own_server_proposes(smollm2, tmp_path):
    """Whatever a small model writes, the search takes what is an instruction in form, tries it and goes on."""
    with serving("--model", "demo:smollm2", folder=tmp_path) as served:
        llm = LLM("demo:smollm2", f"{served.address}/v1", timeout=600, tries=4, wait=0.01, temperature=0.8)
        settings = replace(SMALL, count=2, rounds=1)
        found = run_search([FAMILY], Writer(llm), by_length, tmp_path / "search", settings)
    (family,) = found.families
    assert found.cost["questions"] == 1 and found.stopped["recent"] != "the proposer gave no answer"
    (proposed,) = [json.loads(line) for line in (tmp_path / "search" / "proposals.jsonl").read_text().splitlines()]
    assert proposed["texts"] and all(is_usable(text) for text in proposed["texts"])
    assert FAMILY.instructions[0].text not in proposed["texts"]
    assert len(family.instructions) == 2 and found.cost["trials"] == 1 + len(proposed["texts"])
