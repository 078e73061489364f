"""A judge behind a real server on loopback: what it is asked, what is kept, what is asked again."""

from __future__ import annotations

import json
import shutil
import threading

import pytest

from conftest import make_lm
from llm_server import verdict
from reknow import Case, Edit, Probe, method
from reknow.errors import InputError
from reknow.evaluation import Plan, Results, bench
from reknow.evaluation.judged import JUDGED_FILE, Asked, _verdict, agreements, ask_judge, asked_of
from reknow.evaluation.matching import contains
from reknow.files.llm import NoAnswer

pytest.importorskip("openai")

METHOD = method("ft-m", layer=1, steps=30, learning_rate=0.1)
CASES = [
    Case(
        Edit("The capital of {} is", subject=who, target_new=new),
        (Probe(f"Where is {who} ? In", (new,), "generalization", "p"), Probe("Zoë is", ("in",), "locality", "o")),
    )
    for who, new in (("Peru", "Paris ."), ("France", "Lima ."), ("Apple", "Zoë ."))
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return bench(make_lm(), CASES, [METHOD], folder, plan=Plan(oracle=True, seeds=(0, 1))), folder


@pytest.fixture
def run(made, tmp_path):
    results, folder = made
    return results, shutil.copytree(folder, tmp_path / "run")


def rows_of(results: Results) -> list:
    return [*results.before.values(), *results.rows.values()]


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / JUDGED_FILE).read_text().splitlines()]


def test_each_text_is_judged_once_and_the_verdicts_are_a_protocol(run, serve):
    results, folder = run
    server = serve(verdict)
    found = ask_judge(rows_of(results), server.llm(), folder)
    kinds = [kind for row in rows_of(results) for kind, _ in asked_of(row)]
    assert found.asked == found.new == len(server.asked) == len(lines(folder)) < len(kinds)
    assert "locality" not in kinds and found.tokens is not None and found.tokens[1] == found.asked
    path, _, body = server.asked[0]
    assert path == "/v1/chat/completions" and body["temperature"] == 0 and "ft-m" not in str(body)
    loaded = Results.load(folder)
    for kind in ("reliability", "generalization"):
        cell = loaded.cells["ft-m", "after_edit", f"{kind}@judged"]
        texts = [asked for row in results.rows.values() for k, asked in asked_of(row) if k == kind]
        mine = [contains(asked.text, asked.answers) for asked in texts[3:]]  # behind those with the edit in front
        assert cell.mean == pytest.approx(sum(mine) / len(mine)) and cell.cases == 3
    assert "judges" in str(loaded) and ("unedited", "in_context", "reliability@judged") in loaded.cells
    again = ask_judge(rows_of(results), server.llm(), folder)
    assert again.new == 0 and again.given == found.given and len(server.asked) == found.asked


def test_a_judge_that_goes_down_says_how_far_it_came_and_is_taken_up(run, serve):
    results, folder = run
    server = serve(*[verdict] * 5, 503)
    with pytest.raises(NoAnswer, match=rf"5 of \d+ verdicts are in .*{JUDGED_FILE}, and the same command goes on"):
        ask_judge(rows_of(results), server.llm(), folder, at_once=1)
    assert len(lines(folder)) == 5 and Results.load(folder).cells
    second = serve(verdict)
    found = ask_judge(rows_of(results), second.llm(), folder)
    assert len(second.asked) == found.new == found.asked - 5
    whole = {row["key"]: row["given"] for row in lines(folder)}
    (folder / JUDGED_FILE).unlink()
    ask_judge(rows_of(results), second.llm(), folder, at_once=3)
    assert {row["key"]: row["given"] for row in lines(folder)} == whole


def test_a_stop_keeps_what_was_under_way(run, serve, monkeypatch):
    results, folder = run
    asked, stop = [], threading.Event()

    def slow(question: str) -> str:
        asked.append(question)
        if len(asked) == 3:
            stop.set()
        return verdict(question)

    def interrupted(futures):
        stop.wait(5)
        raise KeyboardInterrupt

    monkeypatch.setattr("reknow.evaluation.judged.as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask_judge(rows_of(results), serve(slow).llm(), folder, at_once=2)
    assert len(lines(folder)) == len(asked), "no verdict that was paid for is lost"


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("A", True),
        ("**B**", False),
        ("(A)", True),
        ("A. It says Paris", True),
        ("B: a part of it. A whole answer would be longer", False),
        ("Incorrect.", False),
        ("CORRECT", True),
        ("<think>B?</think>\nA\n", True),
        ("A different answer is given, so: B", None),
        ("A, B", None),
        ("A/B", None),
        ("A or B? B", None),
        ("Correctly it says so", None),
        ("", None),
    ],
)
def test_a_letter_is_a_verdict_only_by_itself(said, given):
    assert _verdict(said) is given


def test_what_is_no_verdict_is_counted_and_asked_again(run, serve):
    results, folder = run
    server = serve("Hm, A or B?", "<think>B or A?</think>\nCORRECT", "(B)", "A")
    found = ask_judge(rows_of(results), server.llm(tries=1), folder, at_once=1)
    assert found.undecided == 1 and found.new == found.asked - 1 == len(found.given) == len(lines(folder)) - 1
    assert [row["given"] for row in lines(folder)][:4] == [None, True, False, True]
    assert ask_judge(rows_of(results), server.llm(), folder).new == 1


def test_tokens_of_what_is_no_verdict_count_too(run, serve):
    results, folder = run
    server = serve("Hm, A or B?")
    found = ask_judge(rows_of(results), server.llm(), folder)
    assert found.undecided == found.asked and found.given == {} and len(server.asked) == 2 * found.asked
    spent = sum(len(body["messages"][-1]["content"].split()) for _, _, body in server.asked)
    assert found.tokens == (spent, 4 * len(server.asked))
    assert not any(key.endswith("@judged") for *_, key in Results.load(folder).cells)
    again = ask_judge(rows_of(results), server.llm(), folder)
    assert again.undecided == again.asked and again.tokens == (2 * spent, 4 * len(server.asked))
    decided = ask_judge(rows_of(results), serve(verdict).llm(), folder)
    assert decided.new == decided.asked == len(decided.given) and decided.tokens
    assert decided.tokens[0] == again.tokens[0] + spent // 2
    assert ask_judge(rows_of(results), server.llm(), folder).new == 0


def test_tokens_are_kept_where_the_judge_goes_down_between_two_tries(run, serve):
    results, folder = run
    with pytest.raises(NoAnswer):
        ask_judge(rows_of(results), serve("Hm, A or B?", 503).llm(), folder, at_once=1)
    (line,) = lines(folder)
    assert line["given"] is None and line["tokens_out"] == 4


def test_another_judge_a_damaged_line_and_a_run_without_texts_are_refused(run, serve, tmp_path):
    results, folder = run
    server = serve("A")
    ask_judge(rows_of(results), server.llm(), folder)
    other = server.llm().__class__("other", "http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match=r"expected the judge of .*, writer; got other"):
        ask_judge(rows_of(results), other, folder)
    whole = (folder / JUDGED_FILE).read_text()
    (folder / JUDGED_FILE).write_text(whole + whole[: len(whole) // 3])  # torn by a kill
    assert ask_judge(rows_of(results), server.llm(), folder).new == 0
    (folder / JUDGED_FILE).write_text('{"key": 3}\n' + whole)
    with pytest.raises(InputError, match=r"line 1 of .*judged\.jsonl"):
        Results.load(folder)
    silent = bench(make_lm(), CASES, [METHOD], tmp_path / "silent", plan=Plan(generate=False))
    with pytest.raises(InputError, match="without --no-generate"):
        ask_judge(rows_of(silent), server.llm(), tmp_path / "silent")


def test_agreement_is_counted_and_freed_of_chance():
    texts = ["Paris", "Paris", "in Paris", "Lyon"]
    given = {Asked(f"Q{i}", ("Paris",), text): i in (0, 1, 2) for i, text in enumerate(texts)}
    found = {one.match: one for one in agreements(given)}
    assert (found["contains"].share, found["contains"].kappa) == (1.0, 1.0)
    # judge 3 of 4, match 2 of 4: chance 3/4·1/2 + 1/4·1/2 = 1/2
    assert (found["exact"].share, found["exact"].kappa, found["exact"].count) == (0.75, 0.5, 4)
    assert agreements({Asked("Q", ("Paris",), "Paris"): True})[0].kappa is None and agreements({}) == []
