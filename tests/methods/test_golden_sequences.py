"""Edit after edit, and MEMIT-FE, against the numbers of their authors' code (tests/golden/README.md)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_golden_memit import CONTEXTS, GOLDEN, models, recorded_covariance  # noqa: F401, fixtures

from conftest import close, our_names
from reknow import Edit
from reknow.errors import InputError
from reknow.methods.alphaedit import AlphaEdit
from reknow.methods.memit import MEMIT
from reknow.methods.rome import ROME

pytestmark = pytest.mark.golden

HEAD = json.loads((GOLDEN / "sequences.json").read_text())
CASES = {case["name"]: case for case in HEAD["cases"]}
TENSORS = load_file(GOLDEN / "sequences.safetensors")
RUNS = {
    "memit_fe": lambda: MEMIT.paper(
        "gpt2-xl", forward_targets=True, layers=(0, 1), covariance_weight=20, steps=20, **CONTEXTS
    ),
    "core": lambda: MEMIT.paper("gpt2-xl", context_variance=0.02, layers=(0,), covariance_weight=20, **CONTEXTS),
    "memit_seq": lambda: MEMIT.paper("gpt2-xl", hold_earlier=True, layers=(0, 1), covariance_weight=20, **CONTEXTS),
    "betaedit": lambda: AlphaEdit.paper(
        "gpt2-xl", leakage_weight=3, refresh=2, null_threshold=0.5, layers=(0, 1), **CONTEXTS
    ),
    "sphere": lambda: AlphaEdit.paper(
        "llama-3-8b", suppression=0.5, null_threshold=5, layers=(1,), steps=20, learning_rate=0.5, **CONTEXTS
    ),
}
"""What papers set, but for what is other in the authors' run on a tiny model."""


@pytest.mark.parametrize("name", CASES)
def test_each_batch_changes_the_model_as_the_authors_does(models, name):  # noqa: F811
    case, lm, method = CASES[name], models[CASES[name]["model"]], RUNS[name]()
    wanted = our_names(case["hparams"])
    assert {field: getattr(method, field) for field in wanted} == wanted
    with lm.restored_afterwards():
        for number, facts in enumerate(case["batches"]):
            edits = [Edit(f["prompt"], subject=f["subject"], target_new=f["target_new"]) for f in facts]
            patch = method.edit(lm, edits)
            for layer in case["hparams"]["layers"]:
                matrix = lm.parts.value[layer]
                factors = TENSORS[f"{name}_{number}/layer_{layer}"]  # (facts, out + in)
                out = lm.weight(matrix).shape[0]
                assert close(patch.deltas[matrix].dense(), (factors[:, :out].T @ factors[:, out:]).double())
            lm.apply(patch)


@pytest.mark.parametrize(("name", "change"), [("memit_seq", "hold_earlier"), ("betaedit", "refresh")])
def test_without_what_is_known_of_earlier_edits_the_second_batch_is_another(models, name, change):  # noqa: F811
    case, lm = CASES[name], models["gpt2"]
    first, second = (
        [Edit(f["prompt"], subject=f["subject"], target_new=f["target_new"]) for f in facts]
        for facts in case["batches"]
    )
    method = RUNS[name]()
    other = type(method)(**vars(method) | {change: False if change == "hold_earlier" else None})
    matrix = lm.parts.value[0]
    with lm.patched(method.edit(lm, first)):
        ours, theirs = (each.edit(lm, second).deltas[matrix].dense() for each in (other, method))
    assert not close(ours, theirs, 0.05)


@pytest.mark.parametrize("fact", HEAD["c_rome"]["facts"])
def test_c_rome_is_r_rome(models, monkeypatch, fact):  # noqa: F811
    """One key in all places (arXiv 2406.11263), also of a subject that is a text's first token."""
    lm, about = models["gpt2"], HEAD["c_rome"]
    before = tuple(template.removesuffix("{}") for template in about["templates"])
    monkeypatch.setitem(lm.memo, ("contexts", ((2, 2),), (), 0), before)
    own = dict(average_keys=True, layer=0, context_groups=((2, 2),), context_first_words=())
    method = ROME.paper("gpt2-xl", **own, **our_names(about["hparams"]))
    (change,) = method.edit(lm, [Edit(**about["facts"][fact])]).deltas.values()
    factors = TENSORS[f"c_rome_{fact}/layer_0"]  # (1, out + in)
    out = change.shape[0]
    assert close(change.dense(), (factors[:, :out].T @ factors[:, out:]).double())


def test_another_weight_finds_the_directions_anew(models):  # noqa: F811
    case, lm = CASES["betaedit"], models["gpt2"]
    batches = [
        [Edit(f["prompt"], subject=f["subject"], target_new=f["target_new"]) for f in b] for b in case["batches"]
    ]
    method = RUNS["betaedit"]()
    heavier, matrix = replace(method, leakage_weight=300.0), lm.parts.value[0]

    def changes(*methods):
        lm.memo.clear()
        with lm.patched(method.edit(lm, batches[0])):
            return [each.edit(lm, batches[1]).deltas[matrix].dense() for each in methods]

    assert torch.equal(changes(method, heavier)[1], changes(heavier)[0])


@pytest.mark.parametrize("settings", [dict(evolving=True, leakage=0.1), dict(refresh=10)])
def test_settings_that_contradict_each_other_are_refused(settings):
    with pytest.raises(InputError, match=r"expected .*leakage.*; got .*: "):
        AlphaEdit(**settings)
