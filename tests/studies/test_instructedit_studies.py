"""The studies of InstructEdit: what their editors are trained and read on, and the tables."""

from __future__ import annotations

import json

import pytest

from reknow import LM
from reknow.errors import InputError
from reknow.instructions import load_families
from reknow.instructions.trial import FamilySplit
from reknow.studies.instructedit.domains import domain_cases, domain_study
from reknow.studies.instructedit.editors import STUDIES, TASKS, Budget, as_trained, run_study
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


@pytest.mark.slow
def test_a_study_of_other_methods_and_one_of_domains(tmp_path, monkeypatch):
    monkeypatch.setitem(STUDIES, "baselines", STUDIES["baselines"]._replace(baselines=("ft-l", "ke")))
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
    lines = gradient_study(LM.demo("gpt2"), tmp_path, Budget(steps=1, batch_size=3, rank=4, test=4))
    found = json.loads((tmp_path / "gradients.json").read_text())
    assert found["silhouette"].keys() == {"multi-task", "InstructEdit"}
    assert all(-1 <= value <= 1 for value in found["silhouette"].values())
    assert (tmp_path / "gradients.png").stat().st_size > 10_000 and "gradients.png" in lines[-1]
