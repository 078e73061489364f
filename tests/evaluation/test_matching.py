"""Four ways to compare what was written with an accepted answer."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reknow.edits import Kind
from reknow.evaluation.matching import MATCHES
from reknow.evaluation.metrics import case_metrics
from reknow.evaluation.readings import Reading


@pytest.mark.parametrize(
    ("text", "answers", "said"),
    [
        (" Paris", ("Paris",), "exact normalised generated contains"),
        (" Paris. It is large", ("Paris",), "exact normalised generated contains"),
        (" Paris\nQ: more", ("Paris",), "exact normalised generated contains"),
        (" paris", ("Paris",), "normalised generated contains"),
        (" the Paris!", ("Paris",), "normalised generated contains"),
        (" Paris, France", ("Paris",), "generated contains"),
        (" It is Paris", ("Paris",), "contains"),
        (" It is Parisian", ("Paris",), ""),
        (" Lyon", ("Paris", "Lyon"), "exact normalised generated contains"),
        (" St. Paul. And", ("St. Paul",), "exact normalised generated contains"),
        (" 3.5 miles", ("3.5 miles",), "exact normalised generated contains"),
        (" 3.5 miles", ("5 miles",), ""),
        (" A", ("A",), "exact normalised generated contains"),
        ("東京。日本", ("東京",), "exact normalised generated contains"),
        ("日本の東京", ("東京",), "contains"),
        (" ++", ("++",), "exact normalised generated contains"),
        ("", ("Paris",), ""),
    ],
)
def test_each_match_asks_more_or_less(text, answers, said):
    assert [name for name, match in MATCHES.items() if match(text, answers)] == said.split()


@settings(max_examples=300, deadline=None)
@given(st.text("Pa .,\n!?東。", max_size=12), st.text("Pa .,!東", min_size=1, max_size=6).filter(str.strip))
def test_what_matches_exactly_matches_in_every_other_way(text, answer):
    exact, normalised, generated, contains = (match(text, [answer]) for match in MATCHES.values())
    assert normalised <= generated <= contains
    assert exact <= normalised or not any(map(str.isalnum, answer)), "signs alone are compared as they stand"


def test_requests_and_paraphrases_have_the_matches_and_failed_edits_none():
    readings = [
        Reading(cast(Kind, kind), "p", "Q", ("Paris",), hits=(True,), top=(1,), nll=0.1, text=text)
        for kind, text in (("reliability", "Paris"), ("generalization", "In Paris"), ("locality", "Paris"))
    ]
    found = {key: value for key, value in case_metrics(readings).items() if key.endswith("@match")}
    assert found == {
        "exact@match": 1,
        "normalised@match": 1,
        "contains@match": 1,
        "paraphrase_exact@match": 0,
        "paraphrase_normalised@match": 0,
        "paraphrase_contains@match": 1,
    }
    assert not any(v for k, v in case_metrics(readings, failed=True).items() if k.endswith("@match"))
