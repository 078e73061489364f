"""WikiBigEdit: records as they are on the hub, and as its code writes them."""

from __future__ import annotations

import json

import pytest

from reknow import load_cases

HUB = {
    "tag": "new",
    "subject": "Ada Moor",
    "update": "Who taught Ada Moor?",
    "ans": "Ben Fen",
    "rephrase": "Who was Ada Moor's teacher?",
    "personas": "Ahoy, who taught Ada Moor?",
    "mhop": "Where was the teacher of Ada Moor born?",
    "mhop_ans": "Lima",
    "loc": "Who taught Cy?",
    "loc_ans": "Dora",
}
OWN_CODE = {{"update": "src", "ans": "alt", "personas": "genv2_mixed"}.get(k, k): v for k, v in HUB.items()}


@pytest.mark.parametrize(("record", "manner"), [(HUB, "personas"), (OWN_CODE, "genv2_mixed")])
def test_a_record_is_an_edit_and_its_questions(tmp_path, record, manner):
    path = tmp_path / "file.json"
    path.write_text(json.dumps([record, {**record, "mhop": None, "mhop_ans": float("nan"), manner: float("nan")}]))
    whole, blank = load_cases(path=path)
    assert (whole.edit.prompt, whole.edit.subject, whole.edit.target_new) == ("Who taught {}?", "Ada Moor", "Ben Fen")
    assert whole.edit.id == "wikibigedit/0"
    assert [(probe.kind, probe.name, probe.answers[0]) for probe in whole.probes] == [
        ("generalization", "rephrase", "Ben Fen"),
        ("generalization", manner, "Ben Fen"),
        ("portability", "mhop", "Lima"),
        ("locality", "loc", "Dora"),
    ]
    assert [probe.name for probe in blank.probes] == ["rephrase", "loc"]
