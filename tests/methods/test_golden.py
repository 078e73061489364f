"""Our numbers against those of the authors' code (tests/golden/README.md)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import our_names
from reknow import FT, LM, ROME, Edit
from reknow.editing.covariance import covariance
from reknow.editing.solvers import cholesky, rank_one, solve
from reknow.editing.values import find_values

pytestmark = pytest.mark.golden

GOLDEN = Path(__file__).parent.parent / "golden"


def golden_cases(file: str):
    return json.loads((GOLDEN / f"{file}.json").read_text())["cases"]


@pytest.fixture(scope="module")
def models():
    return {name: LM(GOLDEN / f"tiny_{name}", dtype=torch.float32) for name in ("gpt2", "llama")}


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((ours.double() - theirs.double()).norm() <= tolerance * theirs.double().norm())


ROME_CASES = [(m, case["name"]) for m in ("gpt2", "llama") for case in golden_cases(f"rome_{m}")]


@pytest.mark.parametrize(("model", "name"), ROME_CASES)
def test_rome_gives_the_authors_vectors(models, model, name):
    lm = models[model]
    head = json.loads((GOLDEN / f"rome_{model}.json").read_text())
    case = next(c for c in head["cases"] if c["name"] == name)
    tensors = load_file(GOLDEN / f"rome_{model}.safetensors")
    mean_key, u, used_key = tensors[f"{name}/keys"]
    value, delta, subtracted, right = tensors[f"{name}/values"]
    averaged, source = "R-ROME" in case["code"], "easyedit" if "EasyEdit" in case["code"] else None
    paper = ROME.paper("gpt2-xl", average_keys=averaged, source=source)
    search = replace(paper, **our_names(case["hparams"]))
    assert search == paper or name != "identity"
    edit = Edit(case["prompt"], subject=case["subject"], target_new=case["target_new"])
    templates = case.get("templates", head["templates"])
    found = find_values(lm, [edit], case["layer"], [t.removesuffix("{}") for t in templates], search)

    losses = case["losses"]
    theirs = torch.tensor(losses["nll"]) + torch.tensor(losses["kl"]) + torch.tensor(losses["weight_decay"])
    assert len(found.losses[0]) == len(theirs)
    assert torch.allclose(torch.tensor(found.losses[0]), theirs, rtol=1e-4)
    assert close(found.mean_key[0], mean_key)
    assert close(found.value[0], value)
    assert close(found.delta[0], delta, 1e-3)
    key = (found.mean_key if averaged else found.key).double()
    output = found.mean_value if averaged else found.value
    assert close(key[0], used_key)
    assert close(output[0], subtracted)
    direction = found.mean_key.double()
    if case["covariance"]:
        direction = solve(cholesky(tensors[f"covariance/{case['covariance']}"]), direction)
    assert close(direction[0] / direction[0].norm(), u)
    ours = rank_one(direction[0], key[0], (found.value + found.delta - output)[0].double())
    assert close(ours.dense(), torch.outer(right, u), 1e-3)


def test_rome_changes_the_logits_as_the_authors_code(models):
    lm = models["gpt2"]
    head = json.loads((GOLDEN / "rome_gpt2.json").read_text())
    case = next(c for c in head["cases"] if c["name"] == "identity")
    wanted = load_file(GOLDEN / "rome_gpt2.safetensors")["identity/logits_after"]
    # The sampled contexts are replaced by the recorded ones.
    groups, seed = ((4, 4),), 0
    lm.memo["contexts", groups, (), seed] = tuple(t.removesuffix("{}") for t in head["templates"])
    method = ROME.paper("gpt2-xl", layer=case["layer"], context_groups=groups, covariance_tokens=0, seed=seed)
    edit = Edit(case["prompt"], subject=case["subject"], target_new=case["target_new"])
    with lm.patched(method.edit(lm, [edit])):
        ids = torch.tensor([lm.tokenizer(edit.text)["input_ids"]])
        assert close(lm.model(ids).logits[0, -1], wanted)


def test_covariance_is_the_authors(models):
    head = json.loads((GOLDEN / "rome_gpt2.json").read_text())["covariance"]
    theirs = load_file(GOLDEN / "rome_gpt2.safetensors")["covariance/layer_0"]
    ours = covariance(models["gpt2"], 0, text=head["texts"], tokens=head["tokens"])
    assert close(ours, theirs)


FINE_TUNING = {
    "ft_l": ("gpt2-xl", dict(loss="last_token", layer=0, steps=3, clamp=7e-4)),
    "ft_l_batch": ("gpt2-xl", dict(loss="last_token", layer=1, steps=4, learning_rate=2e-3, clamp=None)),
    "ft_m": ("gpt2-xl", dict(layer=0, steps=3)),
    "ft_m_batch": ("llama-2-7b", dict(layer=1, steps=4, learning_rate=2e-3, batch_size=2)),
    "locft_bf": ("llama-3-8b", dict(layer=1, breadth_first=True)),
}


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_follows_the_authors_steps(models, name):
    case = next(c for c in golden_cases("ft") if c["name"] == name)
    lm = models[case["model"]]
    paper, tiny = FINE_TUNING[name]
    method = FT.paper(paper, **tiny)
    assert (method.layer, method.steps, method.learning_rate) == (case["layer"], case["num_steps"], case["lr"])
    assert method.clamp == (case["norm_constraint"] or None)
    edits = [Edit(r["prompt"], subject=r["subject"], target_new=r["target_new"]) for r in case["requests"]]
    patch = method.edit(lm, edits)
    (delta,) = patch.deltas.values()
    assert patch.notes["losses"] == pytest.approx(case["losses"], rel=1e-5)
    assert close(delta.dense(), load_file(GOLDEN / "ft.safetensors")[name])
