"""Runs: what is written, what survives a kill, what a sequence shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from conftest import make_lm
from reknow import FT, Case, Probe, display
from reknow.contract import Method, make_patch
from reknow.errors import EditFailed, InputError
from reknow.evaluation import Plan, Results, bench, evaluate
from reknow.evaluation.metrics import PROTOCOLS, case_metrics
from reknow.evaluation.readings import Reading
from reknow.patching.deltas import Dense
from reknow.progress import progress
from runs import make_cases

METHOD = FT(layer=2, steps=40, learning_rate=0.17)
SEQUENCE = Plan("sequential", checkpoints=(2,))


@dataclass(frozen=True)
class Nothing(Method):
    """An editor that changes nothing, breaks down, or wrecks the model."""

    breaks: bool = False
    wrecks: bool = False
    seed: int = 0

    @property
    def name(self):
        return "nothing"

    def edit(self, lm, edits):
        if self.breaks:
            raise EditFailed("expected a finite loss; got NaN: lower the learning rate")
        matrix = lm.parts.value[0]
        deltas: dict = {matrix: Dense(torch.full(lm.weight(matrix).shape, 1e38))} if self.wrecks else {}
        return make_patch(self, lm, edits, deltas, notes={"seed": self.seed})


def comparable(rows) -> list:
    """Rows without what the clock and the memory decide, in order of their keys."""
    return sorted(
        ({k: v for k, v in row.items() if k not in ("seconds", "peak_memory_mb")} for row in rows),
        key=lambda row: json.dumps(row, sort_keys=True),
    )


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]


def test_an_edit_shows_and_the_model_is_as_before():
    lm = make_lm()
    weights = {name: value.clone() for name, value in lm.model.state_dict().items()}
    results = evaluate(lm, make_cases(), METHOD)
    assert results.cells["unedited", "before", "reliability@teacher_forced_exact"].mean == 0.0
    for protocol in PROTOCOLS:
        assert results.cells["ft-m", "after_edit", f"reliability@{protocol}"].mean == 1.0
    assert results.cells["ft-m", "after_edit", "ES@contrast"].cases == 4
    assert all(torch.equal(value, weights[name]) for name, value in lm.model.state_dict().items())
    assert "Free generation begins with the answer" in str(results)


def test_locality_is_one_where_nothing_changed():
    results = evaluate(make_lm(), make_cases(), Nothing())
    for protocol in PROTOCOLS:
        assert results.cells["nothing", "after_edit", f"locality@{protocol}"].mean == 1.0
    changed = evaluate(make_lm(), make_cases(), METHOD)
    assert changed.cells["ft-m", "after_edit", "locality@teacher_forced_tokens"].mean < 1.0


def test_a_broken_edit_is_a_row_and_counts_as_failed(tmp_path):
    results = bench(make_lm(), make_cases(), [Nothing(breaks=True)], tmp_path)
    assert [row["error"] for row in lines(tmp_path)] == [
        "expected a finite loss; got NaN: lower the learning rate"
    ] * 4
    assert results.cells["nothing", "after_edit", "failed@edit"].mean == 1.0
    assert results.cells["nothing", "after_edit", "reliability@generated"].mean == 0.0


def test_a_model_that_answers_nan_fails_and_its_rows_stay_json(tmp_path):
    plan = Plan(held_out=("Lima is in Peru .",))
    results = bench(make_lm(), make_cases(1), [Nothing(wrecks=True)], tmp_path, plan=plan)
    for key in ("ES@contrast", "NS@contrast", "reliability@teacher_forced_exact"):
        assert results.cells["nothing", "after_edit", key].mean == 0.0
    assert results.cells["nothing", "after_edit", "perplexity@side"].mean > 1e200
    assert "NaN" not in (tmp_path / "cases.jsonl").read_text()


def test_a_sequence_shows_forgetting():
    results = evaluate(make_lm(), make_cases(), METHOD, Plan(mode="sequential", checkpoints=(2,)))
    stages = list(dict.fromkeys(stage for method, stage, _ in results.cells if method == "ft-m"))
    assert stages == ["after_edit", "at:2", "end"]
    key = "reliability@teacher_forced_exact"
    assert results.cells["ft-m", "after_edit", key].mean == 1.0
    assert results.cells["ft-m", "end", key].mean < 1.0
    assert results.cells["ft-m", "at:2", key].cases == 2


def test_checkpoints_that_never_come_are_said_in_one_warning(tmp_path):
    plan = Plan("sequential", checkpoints=(2, 4, 5, 9), generate=False)
    for run in (evaluate, lambda *about: bench(about[0], about[1], [about[2]], tmp_path, plan=about[3])):
        with pytest.warns(UserWarning, match="within the 4 cases; 5, 9 will not come") as said:
            results = run(make_lm(), make_cases(), Nothing(), plan)
        assert len(said) == 1 and {stage for _, stage, _ in results.cells} == {"before", "after_edit", "at:2", "end"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(make_lm(), make_cases(), Nothing(), replace(plan, checkpoints=(2, 4)))


def test_a_batch_is_one_patch():
    results = evaluate(make_lm(), make_cases(), FT(layer=2, steps=80, learning_rate=0.07), Plan(mode="batch"))
    assert results.cells["ft-m", "end", "reliability@teacher_forced_exact"].mean == 1.0
    assert results.cells["ft-m", "end", "seconds@edit"].cases == 4


def test_an_answer_longer_than_the_model_is_read_as_far_as_it_goes():
    lm = make_lm()  # 128 positions
    long = Probe("Lima", ("Paris " * 14,), "portability", "essay")
    results = evaluate(lm, [Case(make_cases(1)[0].edit, (long,))], Nothing())
    assert results.cells["nothing", "after_edit", "portability@generated"].mean == 0.0


def test_rows_hold_raw_answers_and_the_manifest_says_what_ran(tmp_path):
    lm = make_lm()
    plan = Plan(seeds=(0, 1), fluency=True)
    bench(lm, make_cases(2), {"fine": METHOD, "none": Nothing()}, tmp_path, plan=plan, dataset="mine")
    rows = lines(tmp_path)
    assert {(row["method"], row["seed"]) for row in rows} == {("fine", 0), ("fine", 1), ("none", 0), ("none", 1)}
    readings = [Reading.from_json(record) for record in rows[0]["readings"]]
    assert [one.kind for one in readings] == ["reliability", "generalization", "locality", "locality", "fluency"]
    assert readings[0].nll_new == readings[0].nll
    assert readings[2].nll_true is not None and readings[3].nll_true is None  # the second is no neighbour
    again = lm.tokenizer(readings[4].prompt + readings[4].text)["input_ids"]  # text is not cut as it was sampled
    assert 90 <= len(again) <= 110, "100 tokens, the prompt's among them"
    settings = json.loads((tmp_path / "manifest.json").read_text())["settings"]
    assert settings["methods"]["fine"]["learning_rate"] == METHOD.learning_rate
    assert settings["model"] == lm.fingerprint.digest
    assert len((tmp_path / "before.jsonl").read_text().splitlines()) == 2


def test_the_edit_in_front_of_the_questions_is_read_for_the_unedited_model_and_for_whom_it_is_asked(tmp_path):
    lm, plan = make_lm(), Plan(in_context=("fine",))
    methods = {"fine": METHOD, "nothing": Nothing()}
    results = bench(lm, make_cases(2), methods, tmp_path, plan=plan)
    stages = [(row["method"], row["stage"]) for row in results.rows.values()]
    both = [("fine", "after_edit"), ("fine", "in_context")] * 2
    assert stages == [("unedited", "in_context")] * 2 + both + [("nothing", "after_edit")] * 2
    first = results.rows["unedited", 0, "single", "in_context", "0"]["readings"][0]
    assert first["prompt"] == "Fact: The capital of Peru is Paris . The capital of Peru is"
    (score,) = lm.score([first["prompt"]], ["Paris ."])
    assert first["nll"] == pytest.approx(score.nll, rel=1e-5)
    assert results.last_stage == "after_edit"
    assert "with the edit in front of the question" in str(results)
    count = len(lines(tmp_path))
    bench(make_lm(), make_cases(2), methods, tmp_path, plan=plan)
    assert len(lines(tmp_path)) == count
    with pytest.raises(InputError, match="single mode"):
        Plan("sequential", in_context=("fine",))


def test_text_right_after_every_second_edit_of_a_sequence():
    prompt = Probe("Peru lives", (), "fluency", "generation")
    cases = [replace(case, probes=(prompt,)) for case in make_cases(4)]
    results = bench_rows(cases, Plan("sequential", fluency=True, fluency_every=2))
    assert [row["readings"][-1]["text"] is not None for row in results] == [True, False, True, False]


def bench_rows(cases, plan):
    rows = evaluate(make_lm(), cases, Nothing(), plan).rows.values()
    return [row for row in rows if row["stage"] == "after_edit"]


def test_the_ratio_of_perplexities_stands_where_the_text_follows_the_request():
    case = make_cases(1)[0]
    request = Probe(case.edit.text, (), "fluency", "request")
    results = evaluate(make_lm(), [replace(case, probes=(*case.probes, request))], Nothing(), Plan(fluency=True))
    readings = [one for one in results.before[("0",)]["readings"] if one["kind"] == "fluency"]
    assert readings[0]["ppl_r"] is None and readings[1]["ppl_r"] > 0
    assert results.cells["unedited", "before", "PPL_r@sampled"].mean == pytest.approx(readings[1]["ppl_r"])
    earlier = {key: value for key, value in readings[1].items() if key != "ppl_r"} | {"ratios": [2.0, 3.0]}
    assert Reading.from_json(earlier) == replace(Reading.from_json(readings[1]), ppl_r=2.0)


def test_a_long_answer_is_compared_word_by_word():
    pytest.importorskip("rouge_score")
    answer = "a b c d e f g h i j"
    reading = Reading("reliability", "rewrite", "Q", (answer,), hits=(True,), top=(1,), nll=0.1, text="a b x d e")
    found = case_metrics([reading])
    assert found["token_f1@written"] == found["rouge_l@written"] == pytest.approx(2 * 4 / 15)
    assert case_metrics([reading], failed=True)["token_f1@written"] == 0.0
    assert "token_f1@written" not in case_metrics([replace(reading, answers=("a b",))])


def test_other_settings_are_refused_and_named(tmp_path):
    bench(make_lm(), make_cases(2), [Nothing()], tmp_path)
    with pytest.raises(InputError, match=r"methods.nothing.breaks is True and was False"):
        bench(make_lm(), make_cases(2), [Nothing(breaks=True)], tmp_path)
    with pytest.raises(InputError, match="cases is 1 and was 2"):
        bench(make_lm(), make_cases(1), [Nothing()], tmp_path)
    with pytest.raises(InputError, match="different names"):
        bench(make_lm(), make_cases(2), [METHOD, replace(METHOD, layer=1)], tmp_path / "other")
    with pytest.raises(InputError, match="different ids"):
        twice = [replace(case, edit=replace(case.edit, id="a")) for case in make_cases(2)]
        evaluate(make_lm(), twice, Nothing())
    with pytest.raises(InputError, match="multiples"):
        Plan("sequential", batch_size=2, checkpoints=(3,))


def test_an_interrupted_run_goes_on_and_drops_a_torn_line(tmp_path, monkeypatch):
    """With edits that are made two at a time: what is left of a pair is made with the pair again, bit for bit."""
    monkeypatch.setattr(FT, "edits_per_call", 2)
    bench(make_lm(), make_cases(), [METHOD], tmp_path / "whole")
    edit_each = FT.edit_each

    def third_fails(self, lm, edits):
        if edits[0].subject == "Apple":
            raise KeyboardInterrupt
        return edit_each(self, lm, edits)

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(FT, "edit_each", third_fails)
        bench(make_lm(), make_cases(), [METHOD], tmp_path / "cut")
    assert len(lines(tmp_path / "cut")) == 2
    with open(tmp_path / "cut" / "cases.jsonl", "r+b") as file:
        file.truncate(len(file.read()) - 9)
    assert len(Results.load(tmp_path / "cut").rows) == 1
    bench(make_lm(), make_cases(), [METHOD], tmp_path / "cut")
    assert comparable(lines(tmp_path / "cut")) == comparable(lines(tmp_path / "whole"))


def run_and_die(folder: str, edits: int) -> None:
    """A sequence that is killed after so many edits."""
    edit, made = FT.edit, []

    def counted(self, lm, wanted):
        if len(made) == edits:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(wanted)
        return edit(self, lm, wanted)

    FT.edit = counted
    bench(make_lm(), make_cases(), [METHOD], folder, plan=SEQUENCE)


def run_until_stopped(folder: str) -> None:
    """A sequence that says when its third edit begins, and then takes its time."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    edit, made = FT.edit, []

    def slow(self, lm, wanted):
        made.append(wanted)
        if len(made) == 3:
            print("third", flush=True)
            time.sleep(60)
        return edit(self, lm, wanted)

    FT.edit = slow
    display.PATIENCE = display.PERIOD = 0
    with progress.shown("bench"):
        bench(make_lm(), make_cases(), [METHOD], folder, plan=SEQUENCE)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT to another process is POSIX")
def test_ctrl_c_leaves_a_run_that_resumes_with_the_same_rows(tmp_path):
    command = f"import conftest, test_runner; test_runner.run_until_stopped({str(tmp_path / 'cut')!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "REKNOW_PROGRESS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", command], env=environment, text=True, **pipes) as process:
        assert process.stdout.readline() == "third\n"
        while "cases read, 8 of 14: ft-m, from edit 3" not in (shown := process.stderr.readline()):
            assert shown
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=50)
    assert process.returncode != 0 and "KeyboardInterrupt" in said
    assert [row["stage"] for row in lines(tmp_path / "cut")] == ["after_edit", "after_edit", "at:2", "at:2"]
    assert not [path.name for path in tmp_path.rglob("*") if path.name.startswith(".") or "tmp" in path.suffix]
    bench(make_lm(), make_cases(), [METHOD], tmp_path / "cut", plan=SEQUENCE)
    bench(make_lm(), make_cases(), [METHOD], tmp_path / "whole", plan=SEQUENCE)
    assert comparable(lines(tmp_path / "cut")) == comparable(lines(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_killed_sequence_resumes_with_the_same_rows(tmp_path, monkeypatch):
    command = f"import conftest, test_runner; test_runner.run_and_die({str(tmp_path / 'cut')!r}, 3)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [row["stage"] for row in lines(tmp_path / "cut")] == [
        "after_edit",
        "after_edit",
        "at:2",
        "at:2",
        "after_edit",
    ]
    edit, again = FT.edit, []
    monkeypatch.setattr(FT, "edit", lambda self, lm, edits: again.append(edits) or edit(self, lm, edits))
    bench(make_lm(), make_cases(), [METHOD], tmp_path / "cut", plan=SEQUENCE)
    assert len(again) == 1  # the other three patches were loaded
    bench(make_lm(), make_cases(), [METHOD], tmp_path / "cut", plan=SEQUENCE)
    assert len(again) == 1
    bench(make_lm(), make_cases(), [METHOD], tmp_path / "whole", plan=SEQUENCE)
    assert comparable(lines(tmp_path / "cut")) == comparable(lines(tmp_path / "whole"))


def test_without_written_answers_the_rest_is_the_same():
    lm, cases = make_lm("gpt2"), make_cases(2)
    whole = evaluate(lm, cases, METHOD)
    quick = evaluate(lm, cases, METHOD, Plan(generate=False))
    kept = {key: cell for key, cell in whole.cells.items() if cell.protocol not in ("generated", "match", "edit")}
    assert {key: cell for key, cell in quick.cells.items() if cell.protocol != "edit"} == kept
    assert "generated" in str(whole) and "generated" not in str(quick)
