"""Paragraphs as answers: EditEverything, and AKEW's three files."""

from __future__ import annotations

import json

import pytest

from reknow import load_cases
from reknow.errors import InputError

TRIPLETS = [{"subject": f"Moor {n}", "prompt": "{} is", "target": f"high {n}"} for n in range(7)]
REWRITE = {
    "prompt": "{} lies in",
    "subject": "Moorland",
    "target_new": {"str": "Peru"},
    "target_true": {"str": "Wales"},
    "question": "Where does Moorland lie?",
    "fact_new_uns": "Moorland, wide and wet, lies in Peru.",
    "unsfact_triplets_GPT": TRIPLETS,
}


def read(tmp_path, record, name=None):
    path = tmp_path / "file.json"
    path.write_text(json.dumps([record]))
    return load_cases(name, path=path)[0]


def own(case):
    """The probes that the record has itself."""
    return [probe for probe in case.probes if probe.kind != "locality"]


def test_everything_is_a_question_and_a_long_answer(tmp_path):
    case = read(tmp_path, {"id": 3, "question": "Add 1 and 1.", "answer": "One and one is two.", "category": "math"})
    assert (case.edit.prompt, case.edit.target_new, case.edit.subject) == (
        "Add 1 and 1.",
        "One and one is two.",
        None,
    )
    assert case.edit.id == "editeverything/3" and own(case) == []


@pytest.mark.parametrize(
    ("record", "prompt", "reworded"),
    [
        ({"case_id": 1, "requested_rewrite": [REWRITE], "questions": []}, "{} lies in?", "Where does Moorland lie?"),
        ({"case_id": 1, "requested_rewrite": REWRITE}, "{} lies in?", "Where does Moorland lie?"),
        (
            {
                "case_id": 1,
                "requested_rewrite": {**REWRITE, "prompt_full": "Moorland lies in"},
                "paraphrase_prompts": ["Moorland's land is", "no"],
            },
            "{} lies in",
            "Moorland's land is",
        ),
    ],
)
def test_akew_asks_for_the_paragraph_of_the_fact(tmp_path, record, prompt, reworded):
    case = read(tmp_path, record, "akew")
    answer = "Moorland, wide and wet, lies in Peru."
    assert (case.edit.prompt, case.edit.subject, case.edit.target_new) == (prompt, "Moorland", answer)
    first, *parts = own(case)
    assert (first.kind, first.prompt, first.answers) == ("generalization", reworded, (answer,))
    assert [(part.prompt, part.answers) for part in parts] == [(f"Moor {n} is", (f"high {n}",)) for n in range(5)]
    assert {(part.kind, part.name) for part in parts} == {("portability", "sub_question")}


def test_akew_without_a_place_for_the_subject_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"'requested_rewrite.prompt': expected {} where the subject stands"):
        read(tmp_path, {"requested_rewrite": {**REWRITE, "prompt": "It lies in"}}, "akew")


def test_what_must_stay_is_asked_too(tmp_path):
    questions = ["Where is the old mill?", "Where is the old bridge?", "Who plays the violin tonight?"]
    records = [{"question": q, "para_question": q, "answer": f"Answer {n}.", "sub_question": [], "sub_answer": []}
               for n, q in enumerate(questions)]  # fmt: skip
    (tmp_path / "file.json").write_text(json.dumps(records))
    cases = load_cases(path=tmp_path / "file.json")
    kept = [{p.name: p for p in case.probes if p.kind == "locality"} for case in cases]
    assert all(set(own) == {"similar", "document", "fact"} for own in kept)
    assert [own["similar"].prompt for own in kept] == [questions[1], questions[0], questions[0]]
    assert kept[0]["similar"].answers == ("Answer 1.",)
    assert len({own["document"].prompt for own in kept}) == len({own["fact"].prompt for own in kept}) == 3
    assert len(kept[0]["document"].answers[0].split()) == 40
    (tmp_path / "one.json").write_text(json.dumps(records[:1]))
    (alone,) = load_cases(path=tmp_path / "one.json")
    assert {p.name for p in alone.probes if p.kind == "locality"} == {"document", "fact"}
