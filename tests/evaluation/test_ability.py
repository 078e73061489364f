"""Tasks of lm-evaluation-harness on edited models: the same numbers as its own class has, in rows that resume."""

from __future__ import annotations

import json
import random
from importlib import import_module
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_lm, some_patch
from families import slow_but
from reknow import LM, Case, Edit, method
from reknow.errors import InputError, MissingExtra
from reknow.evaluation import Plan, Results, bench, harness, score
from reknow.evaluation.ability import ABILITY_FILE, measure_abilities, measure_given
from reknow.evaluation.harness import BUNDLED, check_tasks, loglikelihoods, run_tasks, written

pytest.importorskip("lm_eval")

METHOD = method("ft-m", layer=1, steps=4, learning_rate=0.02)
CASES = [
    Case(Edit("The capital of {} is", subject=who, target_new=new))
    for who, new in (("Peru", "Paris ."), ("France", "Lima ."), ("Apple", "Zoë ."))
]


@pytest.fixture
def few(monkeypatch):
    """Three items of each bundled task, in words that a tiny tokenizer knows or not."""
    whole = harness._bundled

    def cut(name: str) -> dict:
        task = whole(name)
        items = task["custom_dataset"]()["test"].select(range(3))
        return {**task, "custom_dataset": lambda **_: {"test": items}}

    monkeypatch.setattr(harness, "_bundled", cut)


def own_class(lm: LM, **options) -> Any:
    """The same model as the harness opens it."""
    made = import_module("lm_eval.models.huggingface").HFLM
    return made(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=8, device="cpu", **options)


def items_of(name: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (files("reknow") / f"assets/ability/{name}.jsonl").read_text("utf-8").splitlines()
    ]


@pytest.mark.parametrize("model", slow_but(("llama",), ("gpt2", "llama")))
def test_likelihoods_and_texts_are_those_of_the_harness_own_class(model):
    lm, instance = LM.demo(model), import_module("lm_eval.api.instance").Instance
    theirs = own_class(lm)
    pairs = [(item["context"], f" {item['word']}") for item in items_of("lambada_like")[:20]]
    pairs += [(item["prompt"], f" {option}") for item in items_of("choice")[:10] for option in item["options"]]
    pairs += [(item["before"] + " ", option) for item in items_of("cloze")[:10] for option in item["options"]]
    pairs += [("", "The capital of France is Paris"), ("The capital of", " France"), ("Paris", ", the city")]

    def asked(kind: str, arguments: list[tuple]) -> list:
        return [instance(kind, {}, args, 0) for args in arguments]

    wanted = theirs.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    for (mine, said), (other, greedy) in zip(loglikelihoods(lm, pairs), wanted, strict=True):
        assert mine == pytest.approx(other, abs=1e-4) and said == greedy
    ours = harness._asked_by_harness(lm)
    long = " ".join(item["context"] for item in items_of("lambada_like")[:12])
    texts = [(long,), ("The capital of France is Paris",)]
    # Where the tokenizer sets a first token by itself, a text by itself has two of them by default.
    behind_one = own_class(lm, add_bos_token=False)
    rolling = behind_one.loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True)
    found = ours.loglikelihood_rolling(asked("loglikelihood_rolling", texts))
    assert found == pytest.approx(rolling, abs=2e-3)
    until = {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False}
    prompts = [(f"The capital of {country} is", until) for country in ("France", "Peru", "Japan")]
    assert ours.generate_until(asked("generate_until", prompts)) == theirs.generate_until(
        asked("generate_until", prompts), disable_tqdm=True
    )


@pytest.mark.slow
def test_accuracies_are_those_of_the_harness_own_class():
    lm = LM.demo("gpt2")
    theirs = own_class(lm)
    with harness._quiet():
        lm_eval: Any = harness._harness()
        manager = lm_eval.tasks.TaskManager(include_defaults=False)
        wanted = lm_eval.simple_evaluate(theirs, tasks=[harness._bundled("choice")], task_manager=manager)
    (mine,) = run_tasks(lm, ["choice"])
    assert mine.metric == "acc_norm" and len(mine.values) == 130
    assert sum(mine.values) / 130 == pytest.approx(wanted["results"]["choice"]["acc_norm,none"])
    assert 0.3 < sum(mine.values) / 130 < 0.9, "above chance, and not all"


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_tasks_have_a_hundred_items_and_answers_that_cannot_be_counted_out(name):
    items = items_of(name)
    assert len(items) >= 100 and len({json.dumps(item) for item in items}) == len(items)
    if name == "lambada_like":
        assert all(f" {item['word']}" in item["context"] for item in items), "the word stands in the passage"
    else:
        rights = [item["right"] for item in items]
        counts = [rights.count(place) for place in range(len(items[0]["options"]))]
        assert min(counts) > 0.7 * len(items) / len(counts), "no place is right much more often than others"
        assert all(len(set(item["options"])) == len(item["options"]) for item in items)


def test_the_files_are_what_the_script_makes(tmp_path):
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("make_ability", Path(__file__).parents[2] / "scripts" / "make_ability.py")
    assert spec is not None and spec.loader is not None
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.lambada_like() == items_of("lambada_like") and made.cloze() == items_of("cloze")
    assert made.choice(random.Random(0)) == items_of("choice")


def test_patches_are_on_and_nothing_else_changes(capfd, few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no repository, of which git would complain
    lm = make_lm()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = run_tasks(lm, ["choice"])
    drawn = torch.rand(2), np.random.rand(), random.random()
    with lm.patched(some_patch(lm, size=40.0)):
        pairs = [("The capital of Peru is", " Lima")]
        patched = loglikelihoods(lm, pairs)
    assert loglikelihoods(lm, pairs) != patched
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    assert torch.equal(torch.rand(2), drawn[0]) and np.random.rand() == drawn[1] and random.random() == drawn[2]
    assert run_tasks(lm, ["choice"]) == before
    said = capfd.readouterr()
    assert not said.out and not said.err


def test_a_memory_that_rewrites_prompts_answers_as_it_does_elsewhere():
    lm = make_lm()
    edit = Edit("The capital of {} is", subject="Peru", target_new="Paris")
    patch = method("ike-zero").edit(lm, [edit])
    pairs = [("The capital of Peru is", " Paris")]
    plain = loglikelihoods(lm, pairs)
    with lm.patched(patch):
        (found,) = loglikelihoods(lm, pairs)
        (score_,) = lm.score(["The capital of Peru is"], ["Paris"])
        assert found == (pytest.approx(-score_.nll * len(score_.correct)), score_.said) and [found] != plain
        text = written(lm, "The capital of Peru is", {"until": ["zzz"], "max_gen_toks": 4})
        assert text == lm.generate("The capital of Peru is", 4)


@pytest.mark.parametrize("mode", ["batch", "sequential"])
def test_rows_of_their_own_are_in_the_same_results_and_resume(mode, tmp_path, few, monkeypatch):
    lm = make_lm()
    plan = Plan(mode, checkpoints=(2,) if mode == "sequential" else (), seeds=(0, 1))
    bench(lm, CASES, [METHOD], tmp_path, plan=plan)
    weights = lm.model.state_dict()["transformer.wte.weight"].clone()
    measure_abilities(lm, tmp_path, ["choice", "cloze"])
    assert torch.equal(lm.model.state_dict()["transformer.wte.weight"], weights) and not lm.patches
    rows = [json.loads(line) for line in (tmp_path / ABILITY_FILE).read_text().splitlines()]
    stages = ["before"] + (["at:2", "end"] if mode == "sequential" else ["end"]) * 2
    assert [row["stage"] for row in rows if row["task"] == "choice"] == stages
    results = Results.load(tmp_path)
    cell = results.cells["ft-m", "end", "choice@ability"]
    assert cell.cases == 3 and cell.low is not None
    (table,) = [table for table in results.tables() if table.protocol == "ability"]
    assert table.metrics == ("choice", "cloze") and table.rows[0][0] == "unedited"

    def refused(*_):
        raise AssertionError("it is there already")

    with monkeypatch.context() as never:
        never.setattr("reknow.evaluation.ability.run_tasks", refused)
        measure_abilities(lm, tmp_path, ["choice", "cloze"])
    kept = (tmp_path / ABILITY_FILE).read_bytes()
    (tmp_path / ABILITY_FILE).write_bytes(kept[: len(kept) // 2])  # a kill
    measure_abilities(lm, tmp_path, ["choice", "cloze"])
    assert sorted((tmp_path / ABILITY_FILE).read_bytes().splitlines()) == sorted(kept.splitlines())


def test_a_model_of_others_is_measured_beside_its_base(tmp_path, few):
    def edited():
        lm = make_lm()
        lm.weight(lm.parts.value[1]).mul_(3)
        return lm

    def never() -> LM:
        raise AssertionError("it was measured before")

    score(edited, make_lm, CASES, tmp_path, label="other")
    measure_given(edited, make_lm, tmp_path, ["choice"], "other")
    cells = Results.load(tmp_path).cells
    assert ("unedited", "before", "choice@ability") in cells and ("other", "end", "choice@ability") in cells
    measure_given(never, never, tmp_path, ["choice"], "other")  # neither is opened again


def test_own_tasks_run_from_a_folder_and_code_only_when_asked(tmp_path, monkeypatch):
    (tmp_path / "items.jsonl").write_text('{"q": "Lima is in", "a": "Peru"}\n' * 3)
    config = (
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n"
        'output_type: loglikelihood\ndoc_to_text: "{{q}}"\ndoc_to_target: " {{a}}"\n'
        "metric_list: [{metric: %s}]\n"
    )
    (tmp_path / "mine.yaml").write_text(config % (tmp_path / "items.jsonl", "acc"))
    check_tasks([str(tmp_path)])
    for name in (tmp_path, tmp_path / "mine.yaml"):
        (found,) = run_tasks(make_lm(), [str(name)])
        assert found.task == "mine" and len(found.values) == 3
    (tmp_path / "mine.yaml").write_text(config % (tmp_path / "items.jsonl", "perplexity"))
    with pytest.raises(InputError, match="number from 0 to 1"):
        run_tasks(make_lm(), [str(tmp_path)])
    (tmp_path / "mine.yaml").write_text(config % ("items.jsonl", "acc") + "process_docs: !function utils.run\n")
    with pytest.raises(InputError, match=r"expected tasks without code; .*mine.yaml .* --trust-remote-code"):
        check_tasks([str(tmp_path)])
    check_tasks([str(tmp_path)], own_code=True)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="expected YAML files of tasks"):
        check_tasks([str(tmp_path / "none")])
    with pytest.raises(InputError, match="each once"):
        check_tasks(["choice", "choice"])


def test_single_edits_other_models_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    lm = make_lm()
    bench(lm, CASES, [METHOD], tmp_path / "single")
    with pytest.raises(InputError, match=r"pass over all items of choice, 3 times for each method"):
        measure_abilities(lm, tmp_path / "single", ["choice"])
    bench(lm, CASES, [METHOD], tmp_path / "batch", plan=Plan("batch"))
    with pytest.raises(InputError, match="expected the model of"):
        measure_abilities(make_lm("llama"), tmp_path / "batch", ["choice"])
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"reknow\[ability\]"):
        check_tasks(["choice"])


def test_missing_patches_are_named(tmp_path, few):
    lm = make_lm()
    bench(lm, CASES, [METHOD], tmp_path, plan=Plan("sequential", checkpoints=(2,)))
    for file in (tmp_path / "patches" / "ft-m-0").glob("000002.*"):
        file.unlink()
    with pytest.warns(UserWarning, match=r"expected the patches of ft-m .* from edit 3 on are missing"):
        measure_abilities(lm, tmp_path, ["choice"])
    stages = {stage for method_, stage, _ in Results.load(tmp_path).cells if _ == "choice@ability"}
    assert stages == {"before", "at:2"}
