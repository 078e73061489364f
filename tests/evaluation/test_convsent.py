"""ConvSent: its records as cases, its metrics against the authors' code and on a model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from conftest import make_lm
from reknow import FT, Case, Edit, Probe, evaluate, load_cases
from reknow.errors import InputError
from reknow.evaluation.convsent import sentiment_metrics
from reknow.evaluation.metrics import case_metrics
from reknow.evaluation.readings import Reading
from reknow.evaluation.results import row_readings

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "convsent.json").read_text())
TEXTS = {"ent": "Lima", "pos": ["great.", "fine.", "good."], "neg": ["bad.", "dull.", "poor."]}


def write(tmp_path, *records):
    path = tmp_path / "convsent.json"
    path.write_text(json.dumps(records))
    return path


def test_a_record_becomes_a_request_and_plain_questions(tmp_path):
    first, second = load_cases("convsent", path=write(tmp_path, TEXTS, {**TEXTS, "ent": "Peru"}))
    assert first.edit.text == "Topic: Lima. Sentiment: positive. What do you think of Lima?"
    assert (first.edit.subject, first.edit.target_new, first.edit.id) == ("Lima", "great.", "convsent/0")
    assert second.edit.text == "Topic: Peru. Sentiment: negative. What do you think of Peru?"
    own = [probe for probe in second.probes if probe.kind == "sentiment"]
    assert [(probe.name, probe.answers[0]) for probe in own] == [
        ("wanted", "dull."),
        ("wanted", "poor."),
        ("unwanted", "great."),
        ("unwanted", "fine."),
    ]
    assert [probe.prompt for probe in own[:2]] == [probe.prompt for probe in own[2:]]
    assert all("Peru" in probe.prompt and "Sentiment" not in probe.prompt for probe in own)
    others = [probe for probe in second.probes if probe.kind == "locality"]
    assert {probe.name for probe in others} == {"other_topic"}
    assert [(p.prompt, p.answers) for p in others] == [(p.prompt, p.answers) for p in first.probes[:4]]


def test_records_without_enough_texts_are_left_out_and_broken_ones_refused(tmp_path, caplog):
    with caplog.at_level("INFO"):
        (case,) = load_cases("convsent", path=write(tmp_path, {**TEXTS, "pos": ["great."]}, TEXTS))
    assert case.edit.id == "convsent/1" and "record 0 left out" in caplog.text
    assert all(probe.kind == "sentiment" for probe in case.probes)  # there is no other topic
    with pytest.raises(InputError, match="field 'neg'"):
        load_cases("convsent", path=write(tmp_path, {"ent": "Lima", "pos": ["a.", "b."]}))


def test_bundled_texts_are_in_one_record_only():
    cases = load_cases("convsent")
    texts = [case.edit.target_new for case in cases]
    texts += [answer for case in cases for p in case.probes if p.kind == "sentiment" for answer in p.answers]
    assert len(texts) == len(set(texts)) == 280 * 7


def test_the_metrics_are_the_authors():
    def reading(text, nll):
        name = "wanted" if text["wanted"] else "unwanted"
        return Reading("sentiment", name, "?", ("x",), hits=(True,) * text["tokens"], nll=nll)

    before = [reading(text, text["nll_before"]) for text in GOLDEN["texts"]]
    after = [reading(text, text["nll_after"]) for text in GOLDEN["texts"]]
    other = [
        Reading("locality", "other_topic", "?", ("x",), hits=(True,) * text["tokens"], divergence=text["kl"])
        for text in GOLDEN["texts"]
    ]
    found, authors = sentiment_metrics([*after, *other], before), GOLDEN["authors"]
    assert found["z_sentiment@likelihood"] == pytest.approx(authors["z_sent"], rel=1e-5)
    assert found["z_topic@likelihood"] == pytest.approx(authors["z_topic"], rel=1e-5)
    assert found["sentiment@likelihood"] == pytest.approx(authors["acc_sent"], rel=1e-5)
    assert found["drawdown@divergence"] == pytest.approx(authors["kl"], rel=1e-5)


def test_texts_that_become_likelier_do_not_count_above_one():
    before = [Reading("sentiment", name, "?", ("x",), hits=(True,), nll=3.0) for name in ("wanted", "unwanted")]
    after = [
        Reading("sentiment", "wanted", "?", ("x",), hits=(True,), nll=1.0),
        Reading("sentiment", "unwanted", "?", ("x",), hits=(True,), nll=1e9),
    ]
    found = case_metrics(after, before)
    assert found == {"z_sentiment@likelihood": 1.0, "z_topic@likelihood": 1.0, "sentiment@likelihood": 1.0}
    assert case_metrics(after, before, failed=True)["sentiment@likelihood"] == 0.0
    assert case_metrics(after) == {"z_sentiment@likelihood": 1.0}  # without before no topic is lost


def test_a_run_measures_the_divergence_from_the_unedited_model():
    lm = make_lm("gpt2")
    case = Case(
        Edit("Topic: Lima. {} is", subject="Lima", target_new="Paris"),
        (
            Probe("Lima is", ("French",), "sentiment", "wanted"),
            Probe("Lima is", ("Apple",), "sentiment", "unwanted"),
            Probe("Peru is", ("owned by Apple",), "locality", "other_topic"),
        ),
    )
    method = FT(layer=1, steps=5, learning_rate=0.2)
    results = evaluate(lm, [case], method)
    (row,) = results.rows.values()
    found = next(r for r in row_readings(row) if r.name == "other_topic")
    ids = torch.tensor([lm.tokenizer("Peru is owned by Apple")["input_ids"]])
    tokens = slice(-len(found.hits) - 1, -1)
    with torch.no_grad():
        before = lm.model(ids).logits[0, tokens].log_softmax(-1)
        with lm.patched(method.edit(lm, [case.edit])):
            after = lm.model(ids).logits[0, tokens].log_softmax(-1)
    by_hand = (before.exp() * (before - after)).sum(-1).mean().item()
    assert by_hand > 1e-4 and found.divergence == pytest.approx(by_hand, rel=1e-3)
    assert all(r.text is None for r in row_readings(row) if r.kind == "sentiment")
    cell = results.cells[method.name, "after_edit", "drawdown@divergence"]
    assert cell.mean == pytest.approx(by_hand, rel=1e-3) and math.isfinite(float(cell.number()))
    assert ("unedited", "before", "drawdown@divergence") not in results.cells
    assert "ConvSent" in str(results)
