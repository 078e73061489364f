"""Side effects on given text and weights; and the unedited model with the edit in front."""

from __future__ import annotations

import json
import math

import pytest
import torch

from conftest import make_lm, some_patch
from reknow import Case, Edit, Probe, method
from reknow.datasets.text import held_out_texts
from reknow.errors import InputError
from reknow.evaluation import Plan, Results, bench, evaluate, score
from reknow.evaluation.held_out import HeldOut
from reknow.evaluation.soundness import relative_norms, text_kl
from reknow.model.scoring import kl_divergence

TEXTS = ("Lima is in Peru .", "The mother tongue of Danielle is French", "Apple owns Beats Music")
METHOD = method("ft-m", layer=1, steps=4, learning_rate=0.02)
CASES = [
    Case(Edit("The capital of {} is", subject=who, target_new=new), (Probe("Zoë is", ("in",), "locality", "other"),))
    for who, new in (("Peru", "Paris ."), ("France", "Lima ."), ("Apple", "Zoë ."))
]


def test_kl_is_the_mean_over_all_predictions_and_float16_costs_little(lm):
    held_out, patch = HeldOut(lm, TEXTS), some_patch(lm, size=4.0)
    assert held_out.perplexity == pytest.approx(lm.perplexity(TEXTS), rel=1e-5)
    assert held_out.read(lm)[1] < 1e-6, "the same model, but for the rounding of what is kept"
    rows = [lm.tokenizer(text)["input_ids"] for text in TEXTS]

    def log_probs() -> list[torch.Tensor]:
        with torch.no_grad():
            return [lm.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in rows]

    before = log_probs()
    with lm.patched(patch):
        perplexity, kl = held_out.read(lm)
        each = torch.cat([kl_divergence(p, q) for p, q in zip(before, log_probs(), strict=True)])
        assert perplexity == pytest.approx(lm.perplexity(TEXTS), rel=1e-5)
        assert text_kl(lm, TEXTS) == pytest.approx(kl, rel=0.5), "which also counts what a text's last token says"
    assert kl == pytest.approx(float(each.mean()), rel=1e-3) and kl > 1e-3


def test_kl_stops_where_the_base_is_no_longer_kept_and_perplexity_goes_on(monkeypatch):
    lm = make_lm()
    short = HeldOut(lm, TEXTS[:1])
    tokens = len(lm.tokenizer(TEXTS[0])["input_ids"])
    monkeypatch.setattr("reknow.evaluation.held_out._COMPARED_TOKENS", tokens)
    whole = HeldOut(lm, TEXTS)
    with lm.patched(some_patch(lm, size=4.0)):
        assert whole.read(lm)[1] == pytest.approx(short.read(lm)[1], rel=1e-3)
        assert whole.read(lm)[0] == pytest.approx(lm.perplexity(TEXTS), rel=1e-5)
    with pytest.raises(InputError, match="two tokens"):
        HeldOut(lm, ["a"])


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_every_row_after_edits_says_what_they_did_besides(mode, tmp_path):
    lm = make_lm()
    plan = Plan(mode, held_out=TEXTS, checkpoints=(2,) if mode == "sequential" else ())
    results = bench(lm, CASES, [METHOD], tmp_path, plan=plan)
    cell = results.cells["ft-m", results.last_stage, "kl@side"]
    assert cell.mean > 0 and (cell.low is None) == (mode != "single") and "together" not in cell.interval()
    change = results.cells["ft-m", results.last_stage, "weight_change@side"].mean
    patches = [METHOD.edit(lm, [case.edit]) for case in CASES] if mode == "single" else []
    if patches:
        assert change == pytest.approx(sum(max(relative_norms(lm, [p]).values()) for p in patches) / 3, rel=1e-5)
    before = results.cells["unedited", "before", "perplexity@side"]
    assert before.mean == pytest.approx(lm.perplexity(TEXTS), rel=1e-5) and before.low is None
    (table,) = [table for table in results.tables() if table.protocol == "side"]
    assert table.metrics == ("perplexity", "kl", "weight_change")
    lines = (tmp_path / "cases.jsonl").read_text()
    bench(make_lm(), CASES, [METHOD], tmp_path, plan=plan)
    assert (tmp_path / "cases.jsonl").read_text() == lines


def test_rows_of_earlier_versions_have_no_kl_and_are_read(tmp_path):
    bench(make_lm(), CASES, [METHOD], tmp_path, plan=Plan(held_out=TEXTS))
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    for row in rows:
        del row["held_out_kl"], row["weight_change"]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = Results.load(tmp_path)
    assert ("ft-m", "after_edit", "perplexity@side") in results.cells
    assert ("ft-m", "after_edit", "kl@side") not in results.cells


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_the_oracle_is_one_more_row_in_every_mode_and_changes_no_other(mode, tmp_path):
    without = evaluate(make_lm(), CASES, METHOD, Plan(mode))
    lm = make_lm()
    results = bench(lm, CASES, [METHOD], tmp_path, plan=Plan(mode, oracle=True))
    added = {key: row for key, row in results.rows.items() if key[0] == "unedited"}
    assert {key[2:] for key in added} == {(mode, "in_context", name) for name in ("0", "1", "2")}
    clock = ("seconds", "peak_memory_mb")

    def others(rows) -> dict:
        kept = {key: row for key, row in rows.items() if key not in added}
        return {key: {k: v for k, v in row.items() if k not in clock} for key, row in kept.items()}

    assert others(results.rows) == others(without.rows) and dict(results.before) == dict(without.before)
    first = added["unedited", 0, mode, "in_context", "0"]["readings"][0]
    assert first["prompt"] == "Fact: The capital of Peru is Paris . The capital of Peru is"
    assert first["nll"] == pytest.approx(lm.score([first["prompt"]], ["Paris ."])[0].nll, rel=1e-5)
    assert ("unedited", "in_context", "failed@edit") not in results.cells, "it is no edit"
    loaded = Results.load(tmp_path)
    assert loaded.rows.keys() == results.rows.keys() and "with the edit in front of the question" in str(loaded)
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"]["oracle"] is True


def test_a_case_too_long_with_the_edit_in_front_is_scored_without_an_oracle():
    long = Case(Edit("Lima " * 40 + "{} is", subject="Peru", target_new="Paris ."))  # 128 positions
    results = evaluate(make_lm(), [*CASES, long], METHOD, Plan(oracle=True))
    assert {row["case"] for row in results.rows.values() if row["stage"] == "in_context"} == {"0", "1", "2"}
    assert {row["case"] for row in results.rows.values() if row["stage"] == "after_edit"} == {"0", "1", "2", "3"}
    assert not results.failed


def test_scores_of_a_model_of_others_have_side_effects_and_the_oracle(tmp_path):
    """As the same edits have in a run: the base's predictions are kept while the other model is opened."""
    lm = make_lm()
    patch = METHOD.edit(lm, [case.edit for case in CASES])

    def edited():
        opened = make_lm()
        opened.apply(patch)
        return opened

    plan = Plan("batch", held_out=TEXTS, oracle=True)
    mine = bench(lm, CASES, [METHOD], tmp_path / "mine", plan=plan)
    found = score(edited, make_lm, CASES, tmp_path / "theirs", label="ft-m", plan=plan)
    for metric in ("perplexity@side", "kl@side", "weight_change@side"):
        wanted = mine.cells["ft-m", "end", metric].mean
        assert found.cells["ft-m", "end", metric].mean == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    place = ("unedited", "in_context", "reliability@teacher_forced_exact")
    assert found.cells[place] == mine.cells[place]
    same = score(make_lm, make_lm, CASES, tmp_path / "same", label="copy", plan=plan)
    assert same.cells["copy", "end", "kl@side"].mean < 1e-6
    assert ("copy", "end", "weight_change@side") not in same.cells
    with pytest.raises(InputError, match="batch mode with one seed"):
        score(edited, make_lm, CASES, tmp_path / "b", label="x", plan=Plan())


def test_where_everything_differs_the_size_is_not_measured(tmp_path):
    def tuned():
        lm = make_lm()
        for parameter in lm.model.parameters():
            parameter.data.mul_(1.01)
        return lm

    found = score(tuned, make_lm, CASES, tmp_path, label="tuned", plan=Plan("batch", held_out=TEXTS))
    assert ("tuned", "end", "weight_change@side") not in found.cells
    assert found.cells["tuned", "end", "kl@side"].mean > 0


def test_held_out_text_of_a_file(tmp_path):
    assert 5 <= len(held_out_texts()) <= 20 and sum(map(len, held_out_texts())) < 10_000
    file = tmp_path / "text.txt"
    file.write_text("One paragraph.\n\n" + "word " * 5000)
    first, *rest = held_out_texts(file)
    assert first == "One paragraph." and math.isclose(sum(map(len, (first, *rest))), 10_000, rel_tol=0.01)
    file.write_text("\n\n")
    with pytest.raises(InputError, match="expected text of two words at least in"):
        held_out_texts(file)
