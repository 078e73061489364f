"""Presets: that their tables of settings are right, and that a study's page says what the runs hold."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from conftest import make_lm
from reknow import FT, ICE, LM, ROME, Case, Edit, Probe
from reknow.cli.measuring import methods_by_label, read_variants, ready_methods
from reknow.cli.reporting import write_run
from reknow.datasets import DATASETS, load_cases
from reknow.engine.jobs import Local
from reknow.errors import InputError
from reknow.evaluation import Plan, Results, bench
from reknow.studies.articles import ARTICLES, sized
from reknow.studies.comparison import drop_conflicting, limit_probes, merge_sets
from reknow.studies.comparison_page import split_by_set, write_study
from reknow.studies.growth_page import growth_points
from reknow.studies.ice import convergence
from reknow.studies.ice.convergence import SHOWN, TARGETS, TEMPERATURES, consistency, measure_convergence
from reknow.studies.ice.script_ppl_r import METRIC, measure_script_ppl_r, with_script_ppl_r
from reknow.studies.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_what_there_is(name):
    preset = PRESETS[name]
    methods = methods_by_label(preset.methods, [])
    assert len(methods) == len(preset.methods)
    for cases, plan in filter(None, (preset.size, preset.full)):
        sets = cases.data.split(",")
        assert set(sets) <= set(DATASETS) and set(cases.limits) <= set(sets)
        assert set(plan.in_context) <= set(methods)


def test_cases_that_contradict_each_other_are_not_put_into_one_patch():
    made = [
        Case(Edit("{} lies in", subject=s, target_new=a)) for s, a in (("A", "x"), ("B", "y"), ("A", "z"), ("A", "x"))
    ]
    assert drop_conflicting(made) == [made[0], made[1], made[3]]


def test_a_method_without_a_label_is_refused():
    with pytest.raises(InputError, match="got an empty label"):
        read_variants(["=rome"])


def test_a_preset_leaves_out_what_has_no_editor_for_the_model(capsys):
    chosen = methods_by_label(PRESETS["zsre-table"].methods, [])
    assert list(ready_methods(Local(LM.demo()), chosen)) == list(chosen)
    assert set(chosen) - set(ready_methods(Local(make_lm()), chosen)) == {"serac", "mend"}
    said = capsys.readouterr().out
    assert "left out: serac learns to edit" in said and "left out: mend learns to edit" in said


def test_labels_part_the_variants_of_a_method():
    methods = methods_by_label(PRESETS["ice-ablation"].methods, [])
    assert methods["ice"] == ICE() and methods["static"] == ICE(targets="static")
    assert methods["t0.1"] == ICE(temperature=0.1) and methods["now"] == ICE(context_separator=" Now: ")
    assert methods["bare-context"] == ICE(context_introductions=("",)) and len(set(methods.values())) == len(methods)
    weights = methods_by_label(PRESETS["ice-lambda"].methods, [])
    assert [method.consistency_weight for method in weights.values()] == [0, 0.25, 0.5, 1, 2, 4]
    with pytest.raises(InputError, match="different labels"):
        methods_by_label(read_variants(("ice", "ice=ft-m")), [])
    with pytest.raises(InputError, match="method of a setting"):
        methods_by_label(read_variants(("mine=ice",)), ["ice.steps=3"])


def test_the_continual_study_is_three_hundred_edits_of_all_four_sets():
    chosen = PRESETS["ice-continual"].size.cases
    sets = [load_cases(name, limit=chosen.limits.get(name, chosen.limit)) for name in chosen.data.split(",")]
    cases = merge_sets(sets)
    assert len(cases) == 300 and chosen.one_run
    assert {case.edit.id.split("/")[0] for case in cases[:20]} == set(chosen.data.split(","))


def test_limited_probes_are_the_first_probes_of_each_name():
    (case,) = load_cases("counterfact", limit=1)
    (thin,) = limit_probes([case], 2)
    names = [probe.name for probe in thin.probes]
    assert {name: names.count(name) for name in names} == {"paraphrase": 2, "neighborhood": 2, "generation": 2}
    assert limit_probes([case], None) == [case] and thin.edit == case.edit


def make_cases(name: str, subjects=("Peru", "France")) -> list[Case]:
    return [
        Case(
            Edit("The capital of {} is", subject=subject, target_new="Paris .", id=f"{name}/{number}"),
            (
                Probe("Danielle lives in", ("Lima",), "locality", "near"),
                Probe(f"{subject} is in", ("Lima",), "portability", "hop"),
                Probe(f"The capital of {subject} is", (), "fluency", "request"),
            ),
        )
        for number, subject in enumerate(subjects)
    ]


@pytest.mark.slow
def test_a_study_is_one_page_over_its_runs(tmp_path):
    methods = {"fine": FT(layer=2, steps=20, learning_rate=0.17), "weak": FT(layer=2, steps=1)}
    plan = Plan(in_context=("fine",), fluency=True)
    runs = {name: bench(make_lm(), make_cases(name), methods, tmp_path / name, plan=plan) for name in ("one", "two")}
    text = write_study("A study", runs, tmp_path).read_text()
    assert (tmp_path / "study.png").stat().st_size > 1000
    tables = re.findall(r"^\*\*(.*)\*\*$", text, re.M)
    after = [f"{name}, right after the edit" for name in ("one", "two", "all sets")]
    context = [f"{name}, with the edit in front of the question" for name in ("one", "two", "all sets")]
    gains = "Differences on the same cases of all sets, right after the edit"
    assert tables == ["The sets.", *after, *context, gains]
    cells = runs["one"].cells
    fine, weak = (re.search(rf"^\| {name} \| 2 \|.*$", text, re.M)[0].split(" | ") for name in ("fine", "weak"))
    assert fine[2].startswith(cells["fine", "after_edit", "reliability@teacher_forced_tokens"].number())
    assert fine[3].startswith(cells["fine", "after_edit", "reliability@generated"].number())
    fluency = cells["fine", "after_edit", "fluency@sampled"].mean
    assert f"{100 * fluency:.1f}" in fine[6]
    values = [runs[name].case_values for name in ("one", "two")]
    pairs = [
        (each["fine", "after_edit"][case]["locality@teacher_forced_tokens"], other["locality@teacher_forced_tokens"])
        for each in values
        for case, other in each["weak", "after_edit"].items()
    ]
    gain = 100 * sum(one - two for one, two in pairs) / len(pairs)
    assert f"{gain:+.1f} [" in text.partition(gains)[2].partition("| weak |")[2].splitlines()[0].split(" | ")[-1]
    assert "†" not in "".join(fine) and "†" in "".join(weak)


def test_the_scripts_ratio_is_measured_afterwards_and_read_from_runs_of_earlier_versions(tmp_path):
    lm, cases = make_lm(), make_cases("one")
    results = bench(lm, cases, {"fine": FT(layer=2, steps=1)}, tmp_path, plan=Plan(fluency=True))
    assert not with_script_ppl_r(results, tmp_path).added
    measure_script_ppl_r(Local(lm), cases, results, tmp_path)
    lines = (tmp_path / "script_ppl_r.jsonl").read_bytes()
    measure_script_ppl_r(Local(lm), cases, results, tmp_path)
    assert (tmp_path / "script_ppl_r.jsonl").read_bytes() == lines and lines.count(b"\n") == 4
    found = with_script_ppl_r(Results.load(tmp_path), tmp_path)
    assert "PPL_r, script" in write_study("A study", {"one": found}, tmp_path).read_text()
    cells = found.cells["fine", "after_edit", METRIC], found.cells["unedited", "before", METRIC]
    assert all(cell.cases == 2 and cell.mean > 0 for cell in cells)
    earlier = json.loads(json.dumps({"|".join(map(str, key)): row for key, row in results.rows.items()}))
    for row in earlier.values():
        row["readings"][-1] |= {"ratios": [row["readings"][-1].pop("ppl_r"), 3.0]}
    rows = dict(zip(results.rows, earlier.values(), strict=True))
    old = with_script_ppl_r(Results(results.manifest, results.before, rows), tmp_path / "none")
    assert old.cells["fine", "after_edit", METRIC].mean == 3.0
    now = results.cells["fine", "after_edit", "PPL_r@sampled"]
    assert old.cells["fine", "after_edit", "PPL_r@sampled"] == now


def test_a_study_that_has_just_begun_has_a_page_and_another_folder_for_it(tmp_path):
    methods = {"fine": FT(layer=2, steps=1)}
    results = bench(make_lm(), merge_sets([make_cases("one"), make_cases("two")]), methods, tmp_path / "run")
    assert "2" in write_study("begun", {"run": Results(results.manifest, results.before, {})}, tmp_path).read_text()
    (tmp_path / "run" / "cases.jsonl").unlink()
    before = sorted((tmp_path / "run").iterdir())
    write_run(tmp_path / "run", tmp_path / "pages")
    assert sorted((tmp_path / "run").iterdir()) == before
    assert {"report.html", "study.md"} <= {path.name for path in (tmp_path / "pages").iterdir()}


def test_the_reports_of_several_sets_go_where_they_are_wanted(tmp_path):
    for name in ("one", "two"):
        bench(make_lm(), make_cases(name), {"fine": FT(layer=2, steps=1)}, tmp_path / "run" / name)
    before = sorted((tmp_path / "run").rglob("*"))
    write_run(tmp_path / "run", tmp_path / "pages")
    assert sorted((tmp_path / "run").rglob("*")) == before
    pages = {str(path.relative_to(tmp_path / "pages")) for path in (tmp_path / "pages").rglob("*.*")}
    assert {"one/report.html", "two/report.html", "study.md"} <= pages


def test_a_run_over_all_sets_is_taken_apart_again(tmp_path):
    cases = merge_sets([make_cases("one"), make_cases("two")])
    assert [case.edit.id for case in cases] == ["one/0", "two/0", "one/1", "two/1"]
    plan = Plan("sequential", fluency=False)
    sets = split_by_set({"one+two": bench(make_lm(), cases, [FT(layer=2, steps=3)], tmp_path, plan=plan)})
    assert [sorted(case for (case,) in results.before) for results in sets.values()] == [
        ["one/0", "one/1"],
        ["two/0", "two/1"],
    ]
    assert all(len(results.rows) == 4 for results in sets.values())


@pytest.mark.slow
def test_the_inside_of_ice_is_measured_once_and_shown(tmp_path):
    lm, edits = make_lm(), [case.edit for case in make_cases("one")]
    method = ICE(layers=(1,), steps=3)
    rows = measure_convergence(lm, edits, {"ice": method}, tmp_path)
    for targets in TARGETS:
        for temperature in TEMPERATURES:
            row = rows["losses", f"{targets}, T = {temperature:g}", 1]
            assert len(row["losses"]) == len(row["answer_losses"]) == len(row["repetitions"]) == 25
    assert rows["consistency", "unedited", 0]["divergence"] == pytest.approx(consistency(lm, edits[:1])[0])
    with lm.patched(method.edit(lm, edits[1:])):
        assert rows["consistency", "ice", 1]["divergence"] == pytest.approx(consistency(lm, edits[1:])[0], rel=1e-4)
    watched = [row["likeliest"] for row in rows.values() if "likeliest" in row]
    assert len(watched) == 1 and len(watched[0]) == len(SHOWN)
    content = (tmp_path / "inside.jsonl").read_bytes()
    measure_convergence(make_lm(), edits, {"ice": method}, tmp_path)
    assert (tmp_path / "inside.jsonl").read_bytes() == content
    write_run(tmp_path, tmp_path / "pages")
    page = (tmp_path / "pages" / "convergence.md").read_text()
    assert "dynamic, T = 100" in page and "| ice | 2 |" in page and (tmp_path / "pages/convergence.png").exists()
    assert not (tmp_path / "convergence.md").exists()
    with pytest.raises(InputError, match="steps is 4 and was 3"):
        measure_convergence(lm, edits, {"ice": replace(method, steps=4)}, tmp_path)


@pytest.mark.slow
def test_an_edit_that_cannot_be_made_or_read_does_not_end_the_measuring_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(convergence, "TEMPERATURES", (1.0,))
    good, long = make_cases("one")[0].edit, Edit("Peru " * 140, target_new="Lima")
    methods = {"rome": ROME(layer=1, steps=2, context_groups=(), covariance_tokens=0), "ft": FT(layer=1, steps=2)}
    unnamed = Edit("Apple lives in", target_new="Lima")  # without a subject
    rows = measure_convergence(make_lm(), [good, unnamed, long], methods, tmp_path)
    failed = {key[1:]: row["error"] for key, row in rows.items() if "error" in row}
    assert failed["rome", 1].startswith("rome edits at the subject's last token")
    assert all(failed[label, 2].startswith("expected texts of at most 128") for label in ("unedited", "ft"))
    assert rows["consistency", "ft", 1]["nll"] > 0 and all(edit != 0 for _, edit in failed)


@pytest.mark.parametrize("name", ARTICLES)
def test_a_study_of_an_article_names_what_there_is(name):
    study = ARTICLES[name]
    assert study.grows == ("" not in study.parts) and 0 < study.minutes <= 60
    for full in (False, True):
        for preset in sized(study, 3, full=full).parts.values():
            assert methods_by_label(preset.methods, []) and set(preset.size.plan.in_context) <= {"ice"}
            cases = preset.size.cases
            assert cases.limit == 3 and set(cases.data.split(",")) <= set(DATASETS)
            assert all(most <= 3 for most in cases.limits.values())
            assert bool(preset.size.plan.held_out) == study.grows


@pytest.mark.slow
def test_a_growing_study_has_a_line_for_each_number_of_edits(tmp_path):
    lm, cases, runs = make_lm(), load_cases("counterfact", limit=4), {}
    plans = {
        "single": Plan(generate=False),
        "batch-4": Plan("batch", generate=False),
        "sequence": Plan("sequential", checkpoints=(2,), generate=False, held_out=("Some text.",)),
    }
    for name, plan in plans.items():
        runs[name] = bench(
            lm, cases[: 2 if name == "single" else 4], [FT(layer=1, steps=2)], tmp_path / name, plan=plan
        )
    points = growth_points(runs)
    assert list(points) == [
        ("unedited", "–", 0),
        ("ft-m", "each by itself", 1),
        ("ft-m", "one patch", 4),
        ("ft-m", "ten at a time", 2),
        ("ft-m", "ten at a time", 4),
    ]
    wanted = runs["sequence"].cells["ft-m", "at:2", "locality@teacher_forced_exact"]
    assert points["ft-m", "ten at a time", 2]["locality"] == wanted and wanted.cases == 2
    assert "perplexity" not in points["ft-m", "one patch", 4] and "perplexity" in points["ft-m", "ten at a time", 4]
    write_run(tmp_path)
    page = (tmp_path / "growth.md").read_text(encoding="utf-8")
    assert page.count("| ft-m |") == 4 and (tmp_path / "growth.png").exists()
