"""Training steps of methods that learn to edit, against the authors' code (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_golden import GOLDEN, close
from test_golden_learned import mend_names, mend_shape, mend_statistics

from reknow import LM, MEND, Case, Edit, Probe
from reknow.learning.loop import Loop
from reknow.learning.training import Learner, Split, Training

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def tiny() -> LM:
    return LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)


def golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


def train(learner: Learner, lm: LM, cases: list[Case], folder: Path, training: Training) -> list[dict]:
    """Trains on the cases in their order; the rows of the log."""
    size = training.batch_size
    loop = Loop(lm, learner, lambda number: cases[number * size : (number + 1) * size], [], folder, training)
    return loop.run()["log"]


@pytest.mark.parametrize("run", ["one", "two"])
def test_mend_learns_as_the_authors_do(tiny, run, tmp_path):
    """Two updates of two edits each. With two matrices of a shape the statistics hardly move."""
    about, theirs = golden("mend_step")
    theirs = {name.removeprefix(f"{run}/"): value for name, value in theirs.items() if name.startswith(f"{run}/")}
    start = golden("mend")[1]
    layers, count, losses = (about["runs"][run][name] for name in ("layers", "count", "losses"))
    cases = [
        Case(
            Edit(case["prompt"], target_new=case["answer"], rephrasings=(case["paraphrase"],)),
            (Probe(case["other"][0], (case["other"][1],), "locality", "other"),),
        )
        for case in about["cases"]
    ]
    size = about["batches"]
    training = Training(
        steps=len(cases) // size,
        batch_size=1,
        micro_batches=size,
        clip_norm=about["clip"],
        validation=0,
        validate_every=1,
    )
    rate = about["lr"]
    method = MEND.paper(rank=4, layers=layers, learning_rate=rate, step_size_learning_rate=rate)
    assert method.edit_weight == about["c_edit"]
    learner = method.learner(tiny, Split(cases, []), training)
    network = learner.module
    network.groups.scale = dict.fromkeys(network.names, 1.0)  # their step size has no unit
    with torch.no_grad():
        for own, name in mend_names(network):
            first = start[f"network/{name}"]
            own.copy_(first[layers] if "mode" in name else first)
        network.step.copy_(-start["edit_lrs"][-len(network.names) :])
        for kind, transform in network.transforms.items():
            prefix = f"network/{mend_shape(kind)}."
            mean, squares = mend_statistics(start, prefix)
            seen = start[f"{prefix}k"][0]
            squares = squares if count is None else squares * (count - 1) / (seen - 1)
            transform.norm.load_state_dict(
                {"count": seen if count is None else torch.tensor(count), "mean": mean, "squares": squares}
            )

    log = train(learner, tiny, cases, tmp_path, training)
    for i, row in enumerate(log):
        own = losses[i * size : (i + 1) * size]
        for name, other in (("L_edit", "edit"), ("L_loc", "loc")):
            assert row[name] == pytest.approx(sum(one[other] for one in own) / size, rel=1e-4), (i, name)
    for own, name in [*mend_names(network), (network.step, "edit_lrs")]:
        sign = -1 if name == "edit_lrs" else 1  # they add what we subtract
        assert close(sign * own.grad, theirs[f"gradient/{name}"]), name
        assert (sign * own - theirs[f"after/{name}"]).abs().max() < 2e-3 * rate, name
    for kind, transform in network.transforms.items() if count is None else ():
        mean, squares = mend_statistics(theirs, f"after/{mend_shape(kind)}.")
        assert close(transform.norm.mean, mean) and close(transform.norm.squares, squares)
