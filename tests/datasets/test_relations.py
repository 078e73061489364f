"""Negation and reversal: their sentences, where they come from, and that cases without them are as they were."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from reknow.datasets import load_cases
from reknow.edits import cases_digest
from reknow.errors import InputError
from reknow.evaluation.metrics import case_metrics
from reknow.evaluation.readings import Reading

RELATIONS = json.loads((files("reknow") / "assets" / "relations.json").read_text("utf-8"))


def test_every_relation_of_the_sample_has_both_sentences():
    cases = load_cases("counterfact", probes=["reversal", "negation"])
    plain = load_cases("counterfact")
    assert len(cases) == len(plain) == 1000
    for case, other in zip(cases, plain, strict=True):
        assert case.probes[: len(other.probes)] == other.probes and case.edit == other.edit
        negation, reversal = case.probes[len(other.probes) :]
        assert (negation.kind, negation.answers) == ("negation", (case.edit.target_new,))
        subject, new = case.edit.subject or "", case.edit.target_new
        assert subject in negation.prompt and " not" in negation.prompt
        assert (reversal.kind, reversal.answers) == ("reversal", (subject,))
        assert new in reversal.prompt and (subject not in reversal.prompt or subject in new)
    assert all(table["negated"].count("{}") == table["reversed"].count("{}") == 1 for table in RELATIONS.values())


def test_one_kind_alone_and_none_by_default():
    (case,) = load_cases("counterfact", limit=1, probes=["negation"])
    assert case.probes[-1].prompt == "The mother tongue of Danielle Darrieux is not"
    (plain,) = load_cases("counterfact", limit=1)
    assert {probe.kind for probe in plain.probes} == {"generalization", "locality", "fluency"}
    assert cases_digest([plain]) != cases_digest([case])


def test_own_files_have_their_own(tmp_path):
    record = {
        "prompt": "The capital of {Peru} is",
        "target_new": "Paris",
        "negation": [{"prompt": "The capital of Peru is not", "answer": "Paris"}],
        "reversal": [{"prompt": "Paris is the capital of", "answer": ["Peru", "the Republic of Peru"]}],
    }
    file = tmp_path / "own.json"
    file.write_text(json.dumps([record]))
    for probes in ((), ("negation", "reversal")):
        (case,) = load_cases(path=file, probes=probes)
        assert [(probe.kind, probe.answers[0]) for probe in case.probes] == [
            ("negation", "Paris"),
            ("reversal", "Peru"),
        ]


def test_other_sets_and_unknown_kinds_are_refused():
    with pytest.raises(InputError, match=r"unknown kind of probe 'negations'\. Did you mean 'negation'"):
        load_cases("counterfact", probes=["negations"])
    with pytest.raises(InputError, match="each kind of probe once"):
        load_cases("counterfact", probes=["negation", "negation"])
    with pytest.raises(InputError, match=r"expected records of CounterFact with a relation_id"):
        load_cases("zsre", limit=1, probes=["negation"])


def test_a_negation_is_right_where_the_answer_does_not_follow():
    def read(kind, text, hits) -> dict[str, float]:
        reading = Reading(kind, kind, "Q", ("New York",), hits=hits, top=(1, 2), nll=0.5, text=text)
        return case_metrics([reading], [reading])

    said = read("negation", "New York, but", (True, True))
    assert said["negation@generated"] == said["negation@teacher_forced_exact"] == 0
    half = read("negation", "in Lima", (True, False))
    assert half["negation@teacher_forced_tokens"] == 0.5
    assert half["negation@generated"] == half["negation@teacher_forced_exact"] == 1
    assert read("reversal", "New York", (True, True))["reversal@generated"] == 1
    failed = case_metrics(
        [Reading("reversal", "r", "Q", ("A",), hits=(True,), top=(1,), nll=0.1, text="A")], failed=True
    )
    assert failed["reversal@generated"] == 0
