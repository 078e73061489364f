"""Training steps of methods that learn to edit, against the authors' code (tests/golden/README.md)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_golden import GOLDEN, close
from test_golden_learned import ke_name, malmen_names, mend_names, mend_statistics, shape_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from reknow import KE, LM, MALMEN, MEND, Case, Edit, InstructEdit, Probe
from reknow.learning.examples import Losses
from reknow.learning.gradient_network import TransformLearner
from reknow.learning.loop import Loop
from reknow.learning.training import Learner, Split, Training

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def tiny() -> LM:
    return LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)


def golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


def read_cases(about: dict) -> list[Case]:
    """Edits with other facts."""
    more = ("target_true", "task", "instruction")
    return [
        Case(
            Edit(
                case["prompt"],
                target_new=case["answer"],
                rephrasings=(case["paraphrase"],) if "paraphrase" in case else (),
                **{name: case[name] for name in more if name in case},
            ),
            tuple(Probe(prompt, (answer,), "locality", "other") for prompt, answer in case["others"]),
        )
        for case in about["cases"]
    ]


def train(learner: Learner, lm: LM, cases: list[Case], folder: Path, training: Training) -> list[dict]:
    """Trains on the cases in their order; the rows of the log."""
    size = training.batch_size
    loop = Loop(lm, learner, lambda number: cases[number * size : (number + 1) * size], [], folder, training)
    return loop.run()["log"]


def part(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def check_updates(method: MEND | InstructEdit, lm: LM, cases: list[Case], about: dict, theirs: dict, folder: Path):
    """Trains from the authors' `start`, edit after edit; compares losses, the gradient and what is learned."""
    size, rate = about["batches"], about["lr"]
    training = Training(
        steps=len(cases) // size,
        batch_size=1,
        micro_batches=size,
        clip_norm=about["clip"],
        validation=0,
        validate_every=1,
    )
    assert method.edit_weight == about["c_edit"]
    method = replace(method, rank=4, learning_rate=rate, step_size_learning_rate=rate)
    learner = method.learner(lm, Split(cases, []), training)
    assert isinstance(learner, TransformLearner)
    network, start = learner.module, part(theirs, "start")
    network.groups.scale = dict.fromkeys(network.names, 1.0)  # their step size has no unit
    with torch.no_grad():
        for own, name in mend_names(network):
            own.copy_(start[name])
        network.step.copy_(-start["edit_lrs"])  # they add what we subtract
    count = about["count"]
    for kind, transform in network.transforms.items():
        of, names = shape_of(kind), ("mean", "std")
        mean, deviation = (torch.cat([start[f"{of}.{side}_{name}"] for side in "uv"]) for name in names)
        transform.norm.load_state_dict(
            {"count": torch.tensor(count), "mean": mean, "squares": deviation.square() * (count - 1)}
        )

    log = train(learner, lm, cases, folder, training)
    assert len(log) == len(cases) // size
    for i, row in enumerate(log):
        losses = about["losses"][i * size : (i + 1) * size]
        for name, other in (("L_edit", "edit"), ("L_loc", "loc")):
            assert row[name] == pytest.approx(sum(one[other] for one in losses) / size, rel=1e-4), (i, name)
    gradient, after = part(theirs, "gradient"), part(theirs, "after")
    for own, name in mend_names(network):
        assert close(own.grad, gradient[name]), name
        assert (own - after[name]).abs().max() < 2e-3 * rate, name
    assert close(network.step.grad, -gradient["edit_lrs"])
    assert (network.step + after["edit_lrs"]).abs().max() < 2e-3 * rate
    return network


@pytest.mark.parametrize("run", ["one", "two"])
def test_mend_learns_as_the_authors_do(tiny, run, tmp_path):
    """Two updates of two edits each. With two matrices of a shape the statistics hardly move."""
    about, theirs = golden("mend_step")
    theirs, known = part(theirs, run), part(golden("mend")[1], "network")
    layers, count = about["runs"][run]["layers"], about["runs"][run]["count"]
    seen = float(known["(32, 40).k"])
    theirs |= {f"start/{name}": value[layers] if "mode" in name else value for name, value in known.items()}
    theirs["start/edit_lrs"] = golden("mend")[1]["edit_lrs"][-2 * len(layers) :]
    about |= {"losses": about["runs"][run]["losses"], "count": seen if count is None else count}
    network = check_updates(MEND.paper(layers=layers), tiny, read_cases(about), about, theirs, tmp_path)
    for kind, transform in network.transforms.items() if count is None else ():
        mean, squares = mend_statistics(theirs, f"after/{shape_of(kind)}.")
        assert close(transform.norm.mean, mean) and close(transform.norm.squares, squares)


def test_instructedit_learns_as_the_authors_do(tmp_path):
    """Two updates, each of an edit of either of two tasks behind its instruction."""
    config = AutoConfig.from_pretrained(GOLDEN / "tiny_llama")
    config.max_position_embeddings = 160
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny_llama", config=config, dtype=torch.float32)
    lm = LM((model, AutoTokenizer.from_pretrained(GOLDEN / "tiny_llama")))
    about, theirs = golden("instructedit_step")
    cases = read_cases(about)
    for case, of in zip(cases, about["cases"], strict=True):
        assert case.edit.instructed(case.edit.text) == of["instructed"]
    check_updates(InstructEdit.paper(layers=[1]), lm, cases, about, theirs, tmp_path)


def test_malmen_learns_as_the_authors_do(tiny, tmp_path):
    """Two updates of four edits at once in four matrices, with statistics that hardly move."""
    about, theirs = golden("malmen_step")
    cases, size, count, rate = read_cases(about), about["edits"], about["count"], about["lr"]
    training = Training(
        steps=len(cases) // size, batch_size=size, clip_norm=about["clip"], validation=0, validate_every=1
    )
    method = MALMEN.paper(
        "gpt2",
        layers=[0, 1],
        rank=4,
        learning_rate=rate,
        locality_weight=about["locality_weight"],
    )
    learner = method.learner(tiny, Split(cases, []), training)
    network = learner.module
    network.groups.scale = dict.fromkeys(network.names, 1.0)  # their step size has no unit

    def of_matrices(part: str, name: str) -> torch.Tensor:
        groups = network.groups
        return torch.stack(
            [theirs[f"{part}/{shape_of(groups.group[n])}.{name}.weight"][groups.index[n], 0] for n in network.names]
        )

    def all_parameters(part: str):
        yield from ((own, theirs[f"{part}/{name}"], name) for own, name in malmen_names(network))
        yield network.step, of_matrices(part, "lr"), "lr"
        yield network.stiffness, of_matrices(part, "lamda"), "lamda"

    with torch.no_grad():
        for own, first, _ in all_parameters("start"):
            own.copy_(first)
    for kind, norm in network.norms.items():
        out, inside = map(int, kind.split("x"))
        units = torch.cat([torch.ones(inside), torch.full((out,), float(size))])  # their loss is a mean, ours a sum
        mean, deviation = (units * theirs[f"start/{shape_of(kind)}.normalizer.{name}"] for name in ("mean", "std"))
        norm.load_state_dict(
            {"count": torch.tensor(count), "mean": mean, "squares": deviation.square() * (count - 1)}
        )

    log = train(learner, tiny, cases, tmp_path, training)
    for row, losses in zip(log, about["losses"], strict=True):
        assert row["L_edit"] == pytest.approx(losses["gen_loss"], rel=1e-4)
        assert row["L_loc"] == pytest.approx(losses["loc_loss"], rel=1e-4)
    for own, gradient, name in all_parameters("gradient"):
        # They solve in float32, and their deviations have another epsilon.
        assert close(own.grad, gradient, 3e-4), name
    for own, after, name in all_parameters("after"):
        assert (own - after).abs().max() < 5e-3 * rate, name


@pytest.mark.parametrize("margin", ["0.001", "100.0"])
def test_ke_learns_as_the_authors_do(tiny, margin, tmp_path):
    """Three updates of one edit among three other facts; KL is above the margin or below it, where λ falls to 0."""
    about, theirs = golden("ke_step")
    rows, cases, rate = about["runs"][margin], read_cases(about), about["lr"]
    training = Training(steps=len(cases), batch_size=1, decay=True, validation=0, validate_every=1)
    method = KE.paper(
        layers=[1],
        lstm_width=6,
        width=8,
        mlp_width=6,
        max_scale=about["max_scale"],
        margin=float(margin),
        learning_rate=rate,
        locality_facts=3,
    )
    learner = method.learner(tiny, Split(cases, []), training)
    network = learner.module
    start, parameters = part(golden("ke")[1], "network"), dict(network.named_parameters())
    multiplier = parameters.pop("multiplier")
    with torch.no_grad():
        for name, own in parameters.items():
            own.copy_(start[ke_name(name)])

    log = train(learner, tiny, cases, tmp_path, training)
    for row, wanted in zip(log, rows, strict=True):
        for name, other in (("L_edit", "cr"), ("L_loc", "kl"), ("multiplier", "alpha_kl")):
            assert row[name] == pytest.approx(wanted[other], rel=1e-4), name
    assert max(0, multiplier.item()) == pytest.approx(rows[-1]["alpha_after"], rel=1e-4)
    for name, own in parameters.items() if margin == "0.001" else ():
        assert close(own.grad, theirs[f"gradient/{ke_name(name)}"]), name
        assert (own - theirs[f"after/{ke_name(name)}"]).abs().max() < 5e-3 * rate, name


def test_kes_margin_is_lowered_as_the_authors_do(tiny, monkeypatch):
    about, _ = golden("ke_step")
    case, *_ = read_cases(about)
    learner = KE.paper(layers=[1]).learner(tiny, Split([case], [case]), Training(batch_size=1))
    zero = torch.zeros(())
    for success, margin in about["margins"]:
        monkeypatch.setattr(learner, "_losses", lambda *_, share=success: Losses(zero, zero, share, 1.0))
        learner.validate([case])
        assert learner.module.margin.item() == pytest.approx(margin, rel=1e-6)
