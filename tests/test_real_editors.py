"""The editors that are bundled for SmolLM2: found by its fingerprint, as good as documented, taken off again."""

from __future__ import annotations

import pytest
import torch

from conftest import opened
from reknow import Plan, evaluate, load_cases, method
from reknow.model.fingerprint import weight_bits

pytestmark = [pytest.mark.real, pytest.mark.slow]

KNOWN = (0, 7, 27, 34)
"""Records of CounterFact that the model knows: the first four of those in docs/results/trained_editors.md."""
EDITORS = {
    "mend": (0.75, 0.3, 0.55),
    "serac": (0.9, 0.6, 0.9),
    "ke": (0.75, 0.0, 0.45),
    "malmen": (0.75, 0.0, 0.3),
    "instructedit": (0.5, 0.0, 0.3),
}
"""Reliability, generalization and locality, whole answers, that an editor must have there, less than it has."""
KINDS = ("reliability", "generalization", "locality")


@pytest.fixture(scope="module")
def cases():
    records = load_cases("counterfact", limit=KNOWN[-1] + 1)
    return [records[number] for number in KNOWN]


@pytest.mark.parametrize("name", EDITORS)
def test_it_edits_facts_that_it_has_not_read(name, cases, smollm2):
    bits, chosen = weight_bits(smollm2.model), method(name)
    assert chosen.seen(smollm2, [case.edit for case in cases]) == []
    cells = evaluate(smollm2, cases, chosen, Plan(generate=False)).cells
    found = {cell.metric: cell.mean for cell in cells.values() if cell.protocol == "teacher_forced_exact"}
    for kind, least in zip(KINDS, EDITORS[name], strict=True):
        assert found[kind] >= least, (kind, found)
    assert weight_bits(smollm2.model) == bits


def test_it_fits_the_model_in_another_dtype(cases):
    assert method("mend").edit(opened("smollm2", dtype=torch.bfloat16), [cases[0].edit]).deltas
