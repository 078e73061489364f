"""What the search-and-write methods do with nothing but defaults, as it was recorded: the path that users take.

The authors' numbers (test_golden) hold for their settings; these notice when the defaults do something else than they
did. To record anew: `python tests/methods/test_defaults.py`, with the change stated in numbers before
and after.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from reknow import LM, ROME, Edit
from reknow.methods import method

pytestmark = pytest.mark.golden

FILE = Path(__file__).parent.parent / "golden" / "defaults.json"
EDITS = [
    Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    Edit("{} is located in the continent of", subject="Vinson Massif", target_new="Europe"),
    Edit("{} plays the instrument", subject="Toko Yasuda", target_new="piano"),
]
ASKED = {
    "gpt2": ("rome", "r-rome", "memit", "memit-merge", "emmet", "pmet", "alphaedit", "alphaedit-blue"),
    "llama": ("rome", "memit"),
}
CASES = [(model, name) for model, names in ASKED.items() for name in names]


def measured(lm: LM, name: str) -> dict:
    """What edits of all of EDITS come to: one batch, or where the method makes one after the other each by itself."""
    chosen = method(name)
    batches = [[edit] for edit in EDITS] if isinstance(chosen, ROME) else [EDITS]
    patches, scores, searched = [chosen.edit(lm, edits) for edits in batches], [], []
    for patch, edits in zip(patches, batches, strict=True):
        with lm.patched(patch):
            scores += lm.score([edit.text for edit in edits], [edit.target_new for edit in edits])
        searched += [patch.notes["losses"]] if isinstance(chosen, ROME) else patch.notes["losses"]
    return {
        "contexts": list(chosen.contexts(lm)),
        "matrices": list(patches[0].deltas),
        "norms": [delta.norm() for patch in patches for delta in patch.deltas.values()],
        "passes": [len(losses) for losses in searched],
        "first": [losses[0] for losses in searched],
        "last": [losses[-1] for losses in searched],
        "probabilities": [math.exp(-score.nll) for score in scores],
    }


@pytest.fixture(scope="module")
def models():
    return {name: LM.demo(name) for name in ASKED}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), CASES)
def test_the_defaults_do_what_they_did(models, model, name):
    recorded, lm = json.loads(FILE.read_text())[model][name], models[model]
    found = measured(lm, name)
    assert found["contexts"] == recorded["contexts"]
    assert found["matrices"] == recorded["matrices"]
    assert found["norms"] == pytest.approx(recorded["norms"], rel=1e-2)
    assert found["first"] == pytest.approx(recorded["first"], rel=1e-3)
    assert found["last"] == pytest.approx(recorded["last"], rel=2e-2, abs=1e-3)
    assert found["passes"] == pytest.approx(recorded["passes"], abs=1)  # an end may fall one pass sooner
    assert found["probabilities"] == pytest.approx(recorded["probabilities"], abs=1e-2)


if __name__ == "__main__":
    lms = {model: LM.demo(model) for model in ASKED}
    record = {model: {name: measured(lms[model], name) for name in names} for model, names in ASKED.items()}
    FILE.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
