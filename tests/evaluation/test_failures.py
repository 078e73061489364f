"""Runs that go on: an edit that cannot be made, a case that cannot be read, a record that is none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from conftest import bits, make_lm, same, saved
from learned import SETTINGS, TRAINING, some_cases
from reknow import FT, GRACE, IKE, KN, ROME, Case, Edit, Probe, method
from reknow.cli import app
from reknow.datasets import load_cases
from reknow.errors import EditFailed, EditRefused, InputError, TextRefused
from reknow.evaluation import Plan, Results, bench, evaluate
from reknow.evaluation.attempts import attempt
from reknow.learning.editors import Editor, case_keys
from reknow.model.tokens import Text
from reknow.report.page import write_report
from reknow.tracing.known import known_cases

QUICK = FT(layer=2, steps=3, learning_rate=0.1)
SUBJECTS = ROME(layer=1, steps=3, context_groups=(), covariance_tokens=0)


def ask(prompt: str, answer: str = "Lima", subject: str | None = None, **fields) -> Case:
    probe = Probe("The mother tongue of Danielle is", ("French",), "locality", "neighborhood")
    return Case(Edit(prompt, subject=subject, target_new=answer, **fields), (probe,))


THREE = [ask("The capital of {} is", subject="Peru"), ask("Apple lives in"), ask("{} speaks", subject="Zoë")]


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "cases.jsonl").read_text("utf-8").splitlines()]


def errors(results: Results, method: str) -> list[str | None]:
    return [row["error"] for row in results.rows.values() if row["method"] == method]


# ---- edits that a method cannot make


def test_an_edit_without_a_subject_fails_alone_and_is_not_tried_again(tmp_path):
    lm = make_lm()
    before = bits(lm)
    results = bench(lm, THREE, [SUBJECTS, QUICK], tmp_path, plan=Plan(fluency=False))
    first, second, third = errors(results, "rome")
    assert first is third is None and second.startswith("rome edits at the subject's last token")
    assert errors(results, "ft-m") == [None] * 3
    assert results.cells["rome", "after_edit", "failed@edit"].mean == pytest.approx(1 / 3)
    assert results.cells["rome", "after_edit", "reliability@teacher_forced_tokens"].cases == 3
    assert "Failed edits, which count as no success: rome 1 of 3. The first: 1, rome edits" in str(results)
    results.refuse_lost()
    assert same(bits(lm), before)
    written = rows_of(tmp_path)
    bench(make_lm(), THREE, [SUBJECTS, QUICK], tmp_path, plan=Plan(fluency=False))
    assert len(written) == 6 and rows_of(tmp_path) == written


def test_a_failed_edit_counts_as_no_success_even_where_the_model_says_the_answer_anyway():
    lm = make_lm()
    lm.apply(FT(layer=2, steps=40, learning_rate=0.17).edit(lm, [THREE[1].edit]))
    results = evaluate(lm, [THREE[1], THREE[0]], SUBJECTS)
    (row,) = [row for row in results.rows.values() if row["error"] is not None]
    assert all(row["readings"][0]["hits"])
    assert results.case_values["rome", "after_edit"]["0"]["reliability@teacher_forced_exact"] == 0.0
    assert results.case_values["rome", "after_edit"]["0"]["locality@teacher_forced_exact"] == 1.0


@pytest.mark.parametrize(
    ("method", "cases", "failed"),
    [
        (QUICK, [THREE[0], ask("The capital of {} is", "Paris", "Peru"), THREE[2]], [1]),  # two answers to one prompt
        (SUBJECTS, [THREE[1], *THREE[:2], THREE[2]], [0, 2]),
        (QUICK, [*THREE, ask("Apple " * 125)], [3]),
    ],
    ids=["contradiction", "subject", "too long"],
)
def test_a_batch_is_made_of_the_edits_that_can_be_made(method, cases, failed):
    lm = make_lm()
    results = evaluate(lm, cases, method, Plan(mode="batch", generate=False))
    assert [i for i, row in enumerate(results.rows.values()) if row["error"] is not None] == failed
    makeable = [case.edit for i, case in enumerate(cases) if i not in failed]
    with lm.patched(method.edit(lm, makeable)):
        wanted = lm.score([edit.text for edit in makeable], [edit.target_new for edit in makeable])
    found = [row["readings"][0]["nll"] for row in results.rows.values() if row["error"] is None]
    assert found == pytest.approx([score.nll for score in wanted], rel=1e-4)


def test_a_memory_that_refuses_to_change_its_answer_costs_that_step_of_a_sequence_alone(tmp_path):
    lm, grace = make_lm(), GRACE(layer=2, conflict="refuse", steps=3)
    cases = [THREE[0], ask("The capital of {} is", "Paris", "Peru"), THREE[2]]
    plan = Plan("sequential", fluency=False)
    results = bench(lm, cases, [grace], tmp_path, plan=plan)
    assert [row["case"] for row in results.rows.values() if row["error"] is not None] == ["1", "1"]
    assert sorted(path.name for path in (tmp_path / "patches").rglob("*.patch")) == ["000000.patch", "000002.patch"]
    (tmp_path / "cases.jsonl").unlink()
    again = bench(make_lm(), cases, [grace], tmp_path, plan=plan)  # from the patches that were kept
    assert list(again.rows.values()) == list(results.rows.values())


def test_an_edit_that_is_too_long_behind_a_prefix_does_not_cost_the_batch_its_patch():
    lm, method = make_lm(), replace(SUBJECTS, context_groups=((2, 20),))
    short, long = ask("{} speaks", subject="Zoë").edit, ask("{} has" + " Peru" * 37, subject="Apple").edit
    lm.check_length(lm.encode([Text(edit.text, edit.target_new) for edit in (short, long)]))
    patch, costs = attempt(lm, method, [long, short])
    assert patch is not None and patch.edits == (short,)
    assert costs[0].error.startswith("expected texts of at most 128 tokens") and costs[1].error is None


def test_an_edit_that_breaks_down_by_itself_is_named_to_the_batch():
    lm = make_lm()
    with pytest.raises(EditFailed) as caught:
        KN(prompt_share=1.0, threshold=1.0, steps=2).edit(
            lm, [replace(THREE[0].edit, rephrasings=("{} has the capital",))]
        )
    assert caught.value.edit is not None and caught.value.edit.subject == "Peru"


def test_costs_that_earlier_versions_kept_for_a_whole_patch_are_read(tmp_path):
    lm, edits = make_lm(), [THREE[0].edit, THREE[2].edit]
    patch, costs = attempt(lm, QUICK, edits, tmp_path / "000000.patch")
    (tmp_path / "000000.json").write_text(json.dumps(costs[0].to_json()), encoding="utf-8")
    loaded, read = attempt(lm, QUICK, edits, tmp_path / "000000.patch")
    assert loaded.id == patch.id and read == [costs[0]] * 2


def test_what_concerns_the_whole_run_stops_it_at_once(tmp_path):
    with pytest.raises(InputError, match="expected a layer from 0 to") as caught:
        bench(make_lm(), THREE, [replace(QUICK, layer=99)], tmp_path)
    assert not isinstance(caught.value, EditRefused | TextRefused)
    assert not (tmp_path / "cases.jsonl").exists()


def test_a_method_that_makes_no_edit_at_all_is_an_error():
    results = evaluate(make_lm(), [ask("Apple lives in"), ask("Peru has")], SUBJECTS)
    with pytest.raises(EditFailed, match="edits that rome can make; all 2 failed, the first because: rome edits at"):
        results.refuse_lost()


# ---- cases that cannot be read


@pytest.mark.parametrize("kind", ["locality", "fluency", "portability"])
def test_a_case_with_a_question_too_long_for_the_model_fails_and_the_others_are_read_as_without_it(kind):
    lm = make_lm()  # 128 positions
    long = Probe("Peru " * 140, () if kind == "fluency" else ("Lima",), kind, "long")
    case = replace(THREE[2], probes=(long,))
    results = evaluate(lm, [*THREE[:2], case], QUICK, Plan(fluency=True, held_out=("Lima is in Peru .",)))
    assert [row["error"] and row["error"][:33] for row in results.rows.values()] == [
        None,
        None,
        "expected texts of at most 128 tok",
    ]
    assert results.rows["ft-m", 0, "single", "after_edit", "2"]["readings"] == []
    assert results.cells["ft-m", "after_edit", "reliability@generated"].cases == 2
    assert results.cells["ft-m", "after_edit", "failed@edit"].mean == pytest.approx(1 / 3)
    alone = evaluate(lm, THREE[:2], QUICK, Plan(fluency=True, held_out=("Lima is in Peru .",)))
    for found, wanted in zip(results.rows.values(), alone.rows.values(), strict=False):
        assert found["readings"] == wanted["readings"]


def test_a_case_that_cannot_be_read_stays_out_of_a_sequence_and_out_of_the_contexts():
    case = replace(THREE[2], probes=(Probe("Peru " * 140, ("Lima",), "locality", "long"),))
    results = evaluate(make_lm(), [THREE[0], case, THREE[1]], QUICK, Plan(mode="sequential"))
    assert [row["case"] for row in results.rows.values() if row["error"]] == ["1", "1"]  # after its turn, at the end
    fits = replace(THREE[2], probes=(Probe("Peru " * 38, ("Lima",), "locality", "behind the fact"),))
    plan = Plan(fluency=False, generate=False, in_context=("ft-m",))
    assert evaluate(make_lm(), [fits], QUICK, Plan(generate=False)).failed == {}
    results = bench_in_memory([THREE[0], fits], plan)
    assert [row["readings"] == [] for row in results if row["method"] == "ft-m"] == [False, False, True, True]


def test_a_case_that_a_memory_makes_too_long_to_read_fails_alone(tmp_path):
    lm, long = make_lm(), Probe("Peru " * 36, ("Lima",), "locality", "fits without what IKE puts in front")
    cases = [THREE[0], replace(THREE[2], probes=(long,)), THREE[1]]
    results = bench(lm, cases, [IKE(demonstrations=0), QUICK], tmp_path, plan=Plan(fluency=False))
    assert [len(row["readings"]) for row in results.before.values()] == [2, 2, 2]
    assert [len(row["readings"]) for row in results.rows.values()] == [2, 0, 2, 2, 2, 2]
    assert {method: list(cases) for method, cases in results.failed.items()} == {"ike-zero": ["1"]}
    read = [results.cells[name, "after_edit", "locality@generated"].cases for name in ("ike-zero", "ft-m")]
    assert read == [2, 3]
    page = write_report(tmp_path).read_text("utf-8")
    assert "Failed edits: 1." in page and "expected texts of at most 128 tokens" in page
    assert len(bench(make_lm(), cases, [IKE(demonstrations=0), QUICK], tmp_path, plan=Plan(fluency=False)).rows) == 6
    assert len(rows_of(tmp_path)) == 6
    alone = evaluate(lm, [cases[0], cases[2]], IKE(demonstrations=0))
    found = [row["readings"] for row in list(results.rows.values())[:3] if row["readings"]]
    assert found == [row["readings"] for row in alone.rows.values()]


def test_a_run_of_nothing_but_cases_that_cannot_be_read_still_has_results(tmp_path):
    case = replace(THREE[0], probes=(Probe("Peru " * 140, ("Lima",), "locality", "long"),))
    results = bench(make_lm(), [case], [QUICK], tmp_path)
    assert "Failed edits, which count as no success: ft-m 1 of 1. The first: 0, expected texts" in str(results)
    assert results.cells["ft-m", "after_edit", "failed@edit"].mean == 1.0
    assert "expected texts of at most 128 tokens" in write_report(tmp_path).read_text("utf-8")
    with pytest.raises(EditFailed, match="all 1 failed"):
        results.refuse_lost()


def test_a_training_begins_without_cases_that_the_model_cannot_read(tmp_path, caplog):
    lm, long = make_lm(), Probe("Peru " * 140, ("Lima",), "locality", "long")
    cases = some_cases(40)
    cases[7] = replace(cases[7], probes=(long,))
    training = replace(TRAINING, steps=2)
    made = method("mend", **SETTINGS["mend"]).fit(lm, cases, tmp_path, training)
    assert "1 of 40 cases left out; the first: 7, expected texts of at most 128 tokens" in caplog.text
    known, unknown = case_keys(cases[:7]).tolist(), case_keys(cases[7:8]).tolist()
    seen = set(Editor.load(made.editor).seen.tolist())
    assert set(known) <= seen and not set(unknown) & seen


def test_a_case_that_cannot_be_read_is_not_known():
    lm = make_lm()
    long = ask("Peru " * 140, target_true="Lima")
    said = ask("Apple lives in", target_true="Lima")
    lm.apply(FT(layer=2, steps=40, learning_rate=0.17).edit(lm, [THREE[1].edit]))
    assert known_cases(lm, [long, said, THREE[0]]) == [said]


def bench_in_memory(cases, plan):
    return list(evaluate(make_lm(), cases, QUICK, plan).rows.values())


# ---- records that are none

ZSRE = {"src": "Who is Zoë?", "subject": "Zoë", "alt": "Lima", "answers": ["Ada"], "rephrase": "Zoë?", "loc": "nq"}
ZSRE |= {"loc_ans": "a"}


def write(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_records_that_are_none_are_named_and_the_others_read(tmp_path):
    blank = {**ZSRE, "loc": ""}
    path = write(tmp_path / "z.json", [ZSRE, blank, 5, ZSRE, {"src": "Who?"}])
    refused: list[str] = []
    cases = load_cases("zsre", path=path, refused=refused)
    assert [case.edit.id for case in cases] == ["zsre/0", "zsre/3"]
    assert [sentence.removeprefix(str(path)).split(":")[0] for sentence in refused] == [
        ", record 1, field 'loc'",
        ", record 2",
        ", record 4, field 'alt'",
    ]
    with pytest.raises(InputError, match=r"record 2: expected an object \{…\}; got 5"):
        load_cases("zsre", path=path)


def test_a_limit_counts_the_records_that_are_none(tmp_path):
    path = write(tmp_path / "z.json", [ZSRE, {**ZSRE, "loc": ""}, ZSRE, {"src": "Who?"}])
    refused: list[str] = []
    assert len(load_cases("zsre", path=path, limit=3, refused=refused)) == 2 and len(refused) == 1
    assert len(load_cases("zsre", path=path, offset=2, limit=1, refused=refused)) == 1 and len(refused) == 1
    with pytest.raises(InputError, match="record 3"):  # nothing else was chosen
        load_cases("zsre", path=path, offset=3, refused=refused)


def test_broken_lines_and_repeated_ids_are_records_that_are_none(tmp_path):
    flat = {"prompt": "Zoë is", "subject": "Zoë", "target_new": "a", "ground_truth": "b", "rephrase_prompt": "c"}
    flat |= {"locality_prompt": "d", "locality_ground_truth": "e", "case_id": 7}
    for broken in ([0, 3], [2]):
        lines = [json.dumps({**flat, "case_id": number}) for number in (1, 2, 3, 4, 2)]
        for place in broken:
            lines[place] = '{"prompt": oops}'
        path = tmp_path / "f.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        refused: list[str] = []
        cases = load_cases("counterfact-easyedit", path=path, refused=refused)
        assert len(cases) + len(refused) == 5
        for place, text in zip(broken, refused, strict=False):
            assert f"line {place + 1}, column 12: expected a JSON array" in text
        assert "got 'counterfact-easyedit/2' twice" in refused[-1]


# ---- numbers as answers


@pytest.mark.parametrize(
    ("written", "text"),
    [("1945", "1945"), ("3.50", "3.50"), ("-7", "-7"), ("1e3", "1e3"), ("9" * 5000, "9" * 5000), ("0.1", "0.1")],
    ids=lambda text: text[:8],
)
def test_a_number_is_the_text_that_stands_in_the_file(tmp_path, written, text):
    path = tmp_path / "z.json"
    path.write_text(json.dumps([{**ZSRE, "alt": "@", "loc_ans": "@"}]).replace('"@"', written), encoding="utf-8")
    (case,) = load_cases("zsre", path=path)
    assert case.edit.target_new == text and case.probes[-1].answers == (text,)


@pytest.mark.parametrize("written", ["true", "null", "{}", "NaN"])
def test_what_is_neither_text_nor_number_is_no_answer(tmp_path, written):
    path = tmp_path / "z.json"
    path.write_text(json.dumps([{**ZSRE, "loc_ans": "@"}]).replace('"@"', written), encoding="utf-8")
    with pytest.raises(InputError, match="record 0, field 'loc_ans': expected a non-empty text; got"):
        load_cases("zsre", path=path)


# ---- the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("model"))


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_bench(data: str, model: str, out):
    return run("bench", "--data", data, "--methods", "rome,ft-m", "--model", model, "--out", out, *QUICKLY)


QUICKLY = ["--set", "steps=2", "--set", "layer=1", "--set", "rome.covariance_tokens=0", "--no-fluency"]


def test_bench_names_what_fails_and_goes_on_and_its_status_says_so(tmp_path, model):
    unnamed = {**ZSRE, "subject": "O'Brien"}  # which the question does not name
    path = write(tmp_path / "z.json", [ZSRE, unnamed, {**ZSRE, "rephrase": False}])
    found = run_bench(f"zsre:{path}", model, tmp_path / "run")
    assert found.exit_code == 1, found.output
    assert "left out:" in found.stderr and "record 2, field 'rephrase'" in found.stderr
    assert "Records that could not be read, in no score: 1." in found.stdout
    assert "rome 1 of 2. The first: zsre/1, rome edits at" in found.stdout
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Edits that failed" in page and "record 2, field &#39;rephrase&#39;" in page
    assert len([row for row in rows_of(tmp_path / "run") if row["method"] != "unedited"]) == 4


def test_of_many_bad_records_the_first_are_named_and_the_others_counted(tmp_path, model):
    path = write(tmp_path / "z.json", [ZSRE, *[{**ZSRE, "alt": True}] * 13])
    found = run_bench(f"zsre:{path}", model, tmp_path / "run")
    assert found.exit_code == 0, found.output
    said = [line for line in found.stderr.splitlines() if "left out:" in line]
    assert len(said) == 11 and "record 10, field 'alt'" in said[9] and "3 more records of that file" in said[10]
    assert len(json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))["refused"]) == 13


def test_bench_ends_in_an_error_where_a_method_makes_no_edit(tmp_path, model):
    path = write(tmp_path / "z.json", [{**ZSRE, "subject": "O'Brien"}] * 2)
    found = run_bench(f"zsre:{path}", model, tmp_path / "run")
    assert found.exit_code == 2
    assert "expected edits that rome can make; all 2 failed, the first because: rome edits at" in found.stderr
    assert (tmp_path / "run" / "report.html").exists()  # what the other method did is not lost
