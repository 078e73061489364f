"""Metrics against values worked out by hand and against the authors' numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from reknow.evaluation import metrics
from reknow.evaluation.intervals import average_cases
from reknow.evaluation.metrics import case_metrics, generated
from reknow.evaluation.readings import Reading

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "metrics.json").read_text())


def reading(kind="reliability", name="rewrite", **changes) -> Reading:
    fields = dict(prompt="The capital of Peru is", answers=("Lima",), hits=(True,), top=(7,), nll=0.5, text=" Lima.")
    return Reading(kind, name, **{**fields, **changes})


def test_three_of_four_tokens_right():
    assert metrics.teacher_forced_tokens((True, False, True, True)) == 0.75
    assert metrics.teacher_forced_exact((True, False, True, True)) == 0.0
    assert metrics.teacher_forced_exact((True, True)) == 1.0


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        (" English.", ["English"], 1),
        (" the ENGLISH language", ["English"], 1),
        (" English-born", ["English"], 1),
        (" Englishman", ["English"], 0),
        (" spoken English", ["English"], 0),
        (" New York City", ["New York"], 1),
        (" New", ["New York"], 0),
        (" NYC, where", ["New York", "NYC"], 1),
        (" U.S. Steel", ["US"], 1),
        (" “Zürich”", ["zürich"], 1),
        (" A", ["A"], 1),  # nothing but an article
        (" B", ["A"], 0),
        ("", ["Lima"], 0),
        (" ? no", ["?"], 1),
        (" no", ["?"], 0),
    ],
)
def test_generated_begins_with_an_answer_at_the_end_of_a_word(text, answers, score):
    assert generated(text, answers) == score


def test_locality_compares_with_before_and_not_with_the_truth():
    before = reading("locality", answers=("Paris Texas",), hits=(False, True, True), top=(1, 2, 3), text=" the a b c")
    after = reading("locality", answers=("Paris Texas",), hits=(False, False, True), top=(1, 9, 3), text=" The a c c")
    found = case_metrics([after], [before])
    assert found["locality@teacher_forced_tokens"] == pytest.approx(2 / 3)
    assert found["locality@teacher_forced_exact"] == 0.0
    assert found["locality@generated"] == 1.0  # two words, as the answer has
    assert found["locality_correct@teacher_forced_tokens"] == pytest.approx(1 / 3)
    same = case_metrics([after], [after])
    assert {key: value for key, value in same.items() if key.startswith("locality@")} == {
        f"locality@{protocol}": 1.0 for protocol in metrics.PROTOCOLS
    }
    assert not any(key.startswith("locality@") for key in case_metrics([after]))


def test_contrast_wants_the_new_answer_on_the_request_and_the_true_one_nearby():
    case = [
        reading(nll_new=math.log(2), nll_true=math.log(4)),
        reading("generalization", nll_new=1.0, nll_true=1.0),  # a tie is no success
        reading("generalization", nll_new=0.1, nll_true=1.0),
        reading("locality", nll_new=math.log(4), nll_true=math.log(2)),
    ]
    found = case_metrics(case, case)
    assert (found["ES@contrast"], found["PS@contrast"], found["NS@contrast"]) == (1.0, 0.5, 1.0)
    assert found["EM@contrast"] == pytest.approx(0.25)
    assert found["NM@contrast"] == pytest.approx(0.25)


def test_score_is_the_harmonic_mean_of_the_means_over_cases():
    cases = [
        {"ES@contrast": 1.0, "PS@contrast": 1.0, "NS@contrast": 0.5},
        {"ES@contrast": 1.0, "PS@contrast": 0.0, "NS@contrast": 0.5},
    ]
    assert average_cases(cases)["S@contrast"][0] == pytest.approx(3 / (1 / 1 + 1 / 0.5 + 1 / 0.5))
    assert metrics.harmonic_mean([1, 1, 0]) == 0.0
    right = {"ES@contrast": 1.0, "PS@contrast": 1.0, "NS@contrast": 1.0}
    without = {"ES@contrast": 1.0, "PS@contrast": 1.0}
    assert average_cases([right, right, without])["S@contrast"] == (1.0, 1.0, 1.0, 2), (
        "a draw without neighbours has no S"
    )


def test_a_mean_is_over_the_cases_that_have_the_metric():
    cases = [{"portability@generated": 1.0, "perplexity@sampled": 10.0}, {"perplexity@sampled": 1000.0}]
    mean, low, high, count = average_cases(cases)["portability@generated"]
    assert (mean, low, high, count) == (1.0, None, None, 1)
    mean, low, high, count = average_cases(cases)["perplexity@sampled"]
    assert mean == pytest.approx(100.0)  # geometric
    assert (low, high, count) == (pytest.approx(10.0), pytest.approx(1000.0), 2)


def test_interval_has_the_width_of_the_standard_error():
    cases = [{"reliability@generated": float(i % 2)} for i in range(400)]
    mean, low, high, _ = average_cases(cases)["reliability@generated"]
    half = 1.96 * 0.5 / math.sqrt(400)
    assert mean == 0.5
    assert low == pytest.approx(mean - half, abs=0.01)
    assert high == pytest.approx(mean + half, abs=0.01)


def test_a_case_averages_its_probes_by_name_too_and_has_no_key_without_probes():
    case = [
        reading("portability", "one_hop", hits=(True,), text=" Lima"),
        reading("portability", "one_hop", hits=(False,), text=" Rome"),
        reading("portability", "alias", hits=(False,), text=" Rome"),
    ]
    found = case_metrics(case, case)
    assert found["portability@generated"] == pytest.approx(1 / 3)
    assert found["portability:one_hop@teacher_forced_exact"] == 0.5
    assert not any("reliability" in key or "locality" in key for key in found)


def test_a_failed_edit_has_no_success_and_keeps_its_locality():
    case = [reading(nll_new=0.1, nll_true=1.0), reading("locality")]
    found = case_metrics(case, case, failed=True)
    assert found["reliability@generated"] == found["ES@contrast"] == 0.0
    assert found["locality@generated"] == 1.0


def test_entropy_of_a_text_worked_out_by_hand():
    # bigrams ab ba ab ba ab: 3/5, 2/5; trigrams aba bab aba bab: 1/2, 1/2
    h2 = -(0.6 * math.log2(0.6) + 0.4 * math.log2(0.4))
    assert metrics.ngram_entropy("a b a b a b") == pytest.approx((2 / 3 * h2 + 4 / 3 * 1.0) / 2)
    assert metrics.ngram_entropy("") == metrics.ngram_entropy("one") == 0.0


def test_entropy_is_that_of_the_authors():
    golden = next(case for case in GOLDEN["cases"] if case["name"] == "n_gram_entropy")
    for text, value in zip(golden["texts"], golden["each"], strict=True):
        assert metrics.ngram_entropy(text) == pytest.approx(value, abs=1e-5)
    assert metrics.text_words(golden["texts"][3]) == golden["tokens"][0]


def test_a_reading_comes_back_from_json():
    one = reading(nll_new=0.25, hits=(True, False), top=(3, 4))
    assert Reading.from_json(json.loads(json.dumps(one.to_json()))) == one
