"""RippleEdits: the sentence taken apart, its six criteria as questions."""

from __future__ import annotations

import json
import logging

import pytest

from reknow import Edit, load_cases
from reknow.errors import InputError


def query(prompt: str, *answers, targets=("Q9",), **fields) -> dict:
    listed = [{"value": value, "aliases": list(aliases)} for value, *aliases in answers]
    return {"prompt": prompt, "answers": listed, "query_type": "regular", "target_ids": [*targets], **fields}


def test_of(*queries, condition: str = "OR") -> dict:
    return {"test_queries": list(queries), "test_condition": condition, "condition_queries": []}


test_of.__test__ = False  # type: ignore[attr-defined]

RECORD = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Ada of Moor is Peru.",
        "subject_id": "Q1",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q2",
        "previous_fact": {
            "prompt": "The name of the country of citizenship of Ada of Moor is Persia.",
            "relation": "COUNTRY_OF_CITIZENSHIP",
            "target_id": "Q3",
        },
    },
    "Relation_Specificity": [
        test_of(query("The name of the mother of Ada of Moor is", ("Dora", "Dorothea"), ("D",)))
    ],
    "Logical_Generalization": [],
    "Subject_Aliasing": [
        test_of(query("The name of the country of citizenship of A. Moor is", ("Peru", "PE"), targets=["Q2"]))
    ],
    "Compositionality_I": [
        test_of(
            query(
                "The name of the capital of the country of citizenship of Ada of Moor is", ("Lima",), targets=["Q2"]
            ),
            query("The currency of the country of citizenship of Ada of Moor is", targets=["Q2"]),
            condition="AND",
        )
    ],
    "Compositionality_II": [],
    "Forgetfulness": [
        test_of(query("The name of the country of citizenship of Ada of Moor, which is not Peru, is", ("Persia",)))
    ],
}


def read(tmp_path, *records, name=None):
    path = tmp_path / "popular.json"
    path.write_text(json.dumps(records))
    return load_cases(name, path=path)


def test_a_record_is_an_edit_and_its_six_criteria(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        (case,) = read(tmp_path, RECORD)
    edit = case.edit
    assert (edit.prompt, edit.subject) == ("The name of the country of citizenship of {} is", "Ada of Moor")
    assert (edit.target_new, edit.target_true, edit.id) == ("Peru", "Persia", "ripple/0")
    assert [(probe.kind, probe.name, probe.answers) for probe in case.probes] == [
        ("portability", "Compositionality_I", ("Lima",)),
        ("portability", "Subject_Aliasing", ("Peru", "PE")),
        ("locality", "Relation_Specificity", ("Dora", "Dorothea")),
        ("locality", "Forgetfulness", ("Persia",)),
    ]
    assert caplog.text.count("question without an answer left out: ") == 1


@pytest.mark.parametrize(
    ("relation", "marked", "target"),
    [
        ("MOTHER", "The name of the mother of {eBay founder} is", "Ada"),
        ("SIBLING", "The names of the siblings of {Ada} are", "Ben"),
        ("SEX_OR_GENDER", "The gender of {Ada} is", "female"),
        ("NUMBER_OF_CHILDREN", "The number of children {Ada Moor} has is", "3"),
        ("AWARD_RECEIVED", "The name of the award {Ada} won is", "Moor"),
        ("LEAGUE", "The name of the league which {Ada} plays in is", "NBA"),
        ("CURRENCY", "The name of the currency in {Peru} is", "sol"),
        ("FOLLOWS", "{Moorland} follows", "Fenland"),
        ("FOLLOWED_BY", "{Moorland} is followed by", "Fenland"),
        ("CONTINENT", "The name of the continent which {Peru} is part of is", "Asia"),
        ("COUNTRY", "The name of the country which {Moor} is associated with is", "Peru"),
    ],
)
def test_phrases_of_the_set_are_taken_apart(tmp_path, relation, marked, target):
    sentence = f"{marked} {target}.".replace("{", "").replace("}", "")
    stated = {"prompt": sentence, "subject_id": "Q1", "relation": relation, "target_id": "Q2"}
    (case,) = read(tmp_path, {"edit": stated, "Logical_Generalization": []})
    wanted = Edit.parse(marked, target)
    assert (case.edit.prompt, case.edit.subject, case.edit.target_new) == (wanted.prompt, wanted.subject, target)
    assert case.edit.target_true is None and case.probes == ()


def test_a_label_with_a_verb_in_it_is_found_by_the_questions(tmp_path):
    record = {**RECORD, "edit": {**RECORD["edit"], "previous_fact": None}}
    record["edit"]["prompt"] = "The name of the author of Moor is All is Well."
    record["Subject_Aliasing"] = [test_of(query("The name of the author of M. is", ("All is Well",), targets=["Q2"]))]
    assert read(tmp_path, record)[0].edit.target_new == "All is Well"


def test_a_sentence_without_an_answer_is_refused(tmp_path):
    record = {"edit": {"prompt": "Ada Moor.", "relation": "MOTHER"}, "Logical_Generalization": []}
    with pytest.raises(InputError, match=r"record 0, field 'edit.prompt': expected a sentence with its answer"):
        read(tmp_path, record)
