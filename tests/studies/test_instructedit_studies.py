"""The studies of InstructEdit: what their editors are trained and read on, and the tables."""

from __future__ import annotations

import json
import re

import pytest

from reknow import LM, Case, Edit
from reknow.datasets.cases import load_cases
from reknow.errors import InputError
from reknow.instructions import load_families
from reknow.instructions.trial import FamilySplit
from reknow.studies.instructedit.domains import domain_cases, domain_study
from reknow.studies.instructedit.editors import (
    STUDIES,
    TASKS,
    Budget,
    as_trained,
    part_of_convsent,
    reading_cases,
    run_study,
)
from reknow.studies.instructedit.gradients import gradient_study
from reknow.studies.instructedit.tables import gain


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


@pytest.mark.parametrize(
    ("domain", "words", "count"),
    [
        ("law", "law|lawyer|judge|jurist|legal|attorney|barrister", 9),
        ("medicine", "medicine|physician|doctor|surgeon|medical|nurse|anatomy|pharma.*|psychiat.*|hospital", 9),
        ("mathematics", "math.*|geometry|algebra|topology|statistics|calculus|logic", 10),
    ],
)
def test_too_few_requests_are_of_the_other_domains_of_the_article(domain, words, count):
    asked = [case.edit for case in load_cases("counterfact")]
    texts = [f"{edit.text} {edit.target_true} {edit.target_new}".lower() for edit in asked]
    assert sum(bool(re.search(rf"\b({words})\b", text)) for text in texts) == count < 50


def test_of_convsent_the_article_keeps_1427_entries_or_that_share():
    many = [Case(Edit(f"What is {i}?", target_new="a number")) for i in range(14390)]
    assert part_of_convsent(many) == part_of_convsent(many[:1428]) == many[:1427]
    cases = FamilySplit.of(load_families()["convsent"]).training
    assert len(cases) == 220 and part_of_convsent(cases) == cases[:22]


@pytest.mark.parametrize("task", TASKS)
def test_text_is_sampled_after_the_first_cases_of_every_task(task):
    cases = reading_cases(load_families()[task], Budget(test=4, fluency=2), unseen=False)
    prompts = [[probe.prompt for probe in case.probes if probe.kind == "fluency"] for case in cases]
    assert [len(of) for of in prompts] == [1, 1, 0, 0]
    assert all(
        case.edit.subject in of[0] for case, of in zip(cases, prompts, strict=True) if of and case.edit.subject
    )
    quiet = reading_cases(load_families()[task], Budget(test=4, fluency=0), unseen=False)
    assert not [probe for case in quiet for probe in case.probes if probe.kind == "fluency"]


@pytest.mark.slow
def test_a_study_of_other_methods_and_one_of_domains(tmp_path, monkeypatch, short_texts):
    monkeypatch.setitem(STUDIES, "baselines", STUDIES["baselines"]._replace(baselines=("ft-l", "ke")))
    lm, budget = LM.demo("gpt2"), Budget(steps=1, batch_size=3, rank=4, test=2, fluency=1)
    text = run_study(lm, "baselines", tmp_path, budget)
    assert all(f"| {name} |" in text for name in ("InstructEdit", "ft-l", "ke"))
    assert (tmp_path / "editors" / "counterfact-recent-convsent-ke-0" / "editor.safetensors").exists()
    assert (
        "| unedited |" in text.partition("fluency@sampled")[2] and "| unedited |" not in text.partition("fluency@")[0]
    )
    assert "gain on unedited |" in text.partition("fluency@sampled")[2] and text.count("gain on unedited") == 1
    text = domain_study(lm, tmp_path, budget)
    assert "(`fluency@sampled`)" in text
    assert "| all domains |" in text and "(4 domains)" in text and text == domain_study(lm, tmp_path, budget)


@pytest.mark.slow
def test_a_study_from_training_to_table(tmp_path):
    lm, said = LM.demo("gpt2"), []
    budget = Budget(steps=1, batch_size=3, rank=4, test=2, fluency=0)
    text = run_study(lm, "tasks", tmp_path, budget, on_progress=said.append)
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
def test_the_figure_of_the_gradients(tmp_path):
    pytest.importorskip("sklearn")
    budget, said = Budget(steps=1, batch_size=3, rank=4, test=4), []
    lines = gradient_study(LM.demo("gpt2"), tmp_path, budget, on_progress=said.append)
    found = json.loads((tmp_path / "gradients.json").read_text())
    kinds = ("multi-task", "InstructEdit")
    asked = {f"tasks, {kind}" for kind in ("single-task", *kinds)} | {f"learned tasks, {kind}" for kind in kinds}
    assert found["silhouette"].keys() == asked | {"Recent", "ZsRE, after"}
    kept = {path.name for path in (tmp_path / "editors").iterdir()}
    assert {"recent-instructed=False-0", "recent-0", "counterfact-recent-0"} <= kept and len(said) == len(kept)
    assert all(-1 <= value <= 1 for value in found["silhouette"].values())
    assert (tmp_path / "gradients.png").stat().st_size > 10_000 and "gradients.png" in lines[-1]
