"""Methods that learn to edit against the authors' code (tests/golden/README.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from test_golden import GOLDEN, close

from reknow import KE, LM, MALMEN, MEND, Edit, UltraEdit
from reknow.learning.editors import Editor, case_keys
from reknow.learning.gradient_network import GradientNetwork
from reknow.learning.gradients import delta_added, flat_factors
from reknow.learning.lifelong import LifelongNorms
from reknow.methods.ke import KENetwork
from reknow.methods.malmen import MALMENNetwork, surrogate
from reknow.model.scored_tokens import ScoredTokens, predictions
from reknow.model.tokens import Text

pytestmark = pytest.mark.golden


def shape_of(kind: str) -> str:
    """A group of matrices by the authors' name."""
    out, inside = map(int, kind.split("x"))
    return f"({inside}, {out})"


def mend_statistics(tensors: dict[str, torch.Tensor], prefix: str) -> tuple[torch.Tensor, ...]:
    """Mean and sum of squares of [u; δ]."""
    return tuple(torch.cat([tensors[f"{prefix}{side}_{name}"] for side in "uv"]) for name in ("mean", "s"))


def mend_names(network: GradientNetwork) -> Iterator[tuple[torch.nn.Parameter, str]]:
    """The parameters of the blocks with their names in the authors' code."""
    names = {"left": "u", "right": "v", "bias": "bias", "scale": "mode_scale.weight", "shift": "mode_shift.weight"}
    for kind, transform in network.transforms.items():
        for i, block in enumerate(transform.blocks):
            for name, other in names.items():
                yield getattr(block, name), f"{shape_of(kind)}.mlp.layers.{i}.{other}"


def test_mend_transforms_gradients_as_the_authors_do(tmp_path):
    lm = LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)
    about, theirs = json.loads((GOLDEN / "mend.json").read_text()), load_file(GOLDEN / "mend.safetensors")
    method = MEND.paper(rank=4, layers=[0, 1])
    network = GradientNetwork(method, lm)

    # Statistics, from the factors of the first two edits.
    rows = lm.encode([Text(prompt, answer) for prompt, answer in about["edits"]])
    for row, loss in zip(rows, about["losses"], strict=True):
        factors, ours = flat_factors(lm, network.names, [row])
        assert abs(ours - loss) < 1e-4
        if row is not rows[2]:
            network.observe(factors)

    # Their parameters: one bias, scale and shift per layer of the network.
    with torch.no_grad():
        for kind, transform in network.transforms.items():
            mean, squares = mend_statistics(theirs, f"network/{shape_of(kind)}.")
            assert float(transform.norm.count) == float(theirs[f"network/{shape_of(kind)}.k"])
            assert close(transform.norm.mean, mean) and close(transform.norm.squares, squares)
        for own, name in mend_names(network):
            own.copy_(theirs[f"network/{name}"])
        unit = torch.tensor([float(lm.weight(name).square().mean().sqrt()) for name in network.names])
        network.step.copy_(-theirs["edit_lrs"] / unit)  # they add, the paper and we subtract

    settings = {"rank": 4, "layers": [0, 1]}
    tensors = network.state_dict()
    editor = Editor("mend", settings, tensors, lm.fingerprint, case_keys([]))
    prompt, answer = about["edits"][2]
    patch = MEND(editor=str(editor.save(tmp_path / "editor.safetensors"))).edit(lm, [Edit(prompt, target_new=answer)])
    for name in network.names:
        assert close(patch.deltas[name].dense(), theirs[f"edit_2/{name}"]), name


def test_ultraedit_gives_the_authors_change():
    lm = LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)
    about, theirs = json.loads((GOLDEN / "ultraedit.json").read_text()), load_file(GOLDEN / "ultraedit.safetensors")
    edits = [Edit(prompt, target_new=answer) for prompt, answer in about["edits"]]
    patch = UltraEdit.paper("gpt-j-6b", layers=[1], learning_rate=about["lr"], min_tokens=2).edit(lm, edits)
    count = patch.state["norm.32x40.count"]
    assert count == about["tokens"]
    # Their loss is a mean over the edits, ours a sum; and their variance of a batch is too large by n / (n − 1).
    units = torch.cat([torch.ones(40), torch.full((32,), 1 / len(edits))])
    excess = (count / (count - 1)).sqrt()
    assert close(patch.state["norm.32x40.mean"] * units, theirs["mean"])
    assert close((patch.state["norm.32x40.squares"] / (count - 1)).sqrt() * units * excess, theirs["std"])
    for name, delta in patch.deltas.items():
        # What is normalised enters three times.
        assert close(delta.dense(), theirs[name] * excess**3, 5e-4), name


def test_stableedit_gives_the_authors_changes(tmp_path):
    """Four facts to warm up, then two batches of four in two matrices, whose gradients are whitened."""
    lm = LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)
    about, theirs = json.loads((GOLDEN / "stableedit.json").read_text()), load_file(GOLDEN / "stableedit.safetensors")
    size, edits = about["batch"], [Edit(prompt, target_new=answer) for prompt, answer in about["edits"]]
    stream = tmp_path / "stream.json"
    stream.write_text(json.dumps([{"prompt": edit.prompt, "target_new": edit.target_new} for edit in edits[:size]]))
    method = UltraEdit.paper(
        "mistral-7b",
        whiten=True,
        warm_up=str(stream),
        layers=[0, 1],
        batch_size=size,
        learning_rate=about["lr"],
        whitening_floor=about["floor"] * size**2,  # their loss is a mean over a batch's edits, ours a sum
    )
    assert method.ridge == about["ridge"]
    first = method.edit(lm, edits[size : 2 * size])
    lm.apply(first)
    second = method.edit(lm, edits[2 * size :])
    for name in first.deltas:
        warm_up_and_first = theirs[f"delta_0/{name}"] + theirs[f"delta_1/{name}"]
        assert close(first.deltas[name].dense(), warm_up_and_first, 5e-4), name
        assert close(second.deltas[name].dense(), theirs[f"delta_2/{name}"], 5e-4), name
    norms = LifelongNorms([first, second], floor=1.0)
    count = sum(float(patch.state["whitening.32x40.count"]) for patch in (first, second))
    assert count == about["tokens"]
    scatter = norms.scatters_before["32x40"]
    assert close(scatter.scatter / (count - 32 - 1) / size**2, theirs["cov_value"], 5e-4)
    assert close(scatter.mean / size, theirs["mean"][40:], 5e-4)


def ke_name(name: str) -> str:
    """The authors' name of a parameter of KE's network."""
    part, _, rest = name.partition(".")
    if part == "heads":
        number, layer, kind = *rest.split(".")[:2], rest.split(".")[2:]
        kind = {"original0": "weight_g", "original1": "weight_v"}.get(kind[-1], kind[-1])
        return f"conditioners.m{number}_weight_conditioner.conditioners.{layer}.{kind}"
    return f"condition.{'lstm._module' if part == 'reader' else 'linear._linear_layers.0'}.{rest}"


def test_ke_reads_an_edit_as_the_authors_do():
    lm = LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)
    about, theirs = json.loads((GOLDEN / "ke.json").read_text()), load_file(GOLDEN / "ke.safetensors")
    network = KENetwork(KE.paper(layers=[1], lstm_width=6, width=8, mlp_width=6), lm)
    assert network.names == about["matrices"]

    parts = {name: theirs[f"network/{ke_name(name)}"] for name, _ in network.named_parameters() if "." in name}
    own = network.state_dict() | parts
    network.load_state_dict(own)

    edit = Edit(about["prompt"], target_new=about["new"], target_true=about["old"])
    with torch.no_grad():
        changes, loss = network(lm, [edit], [Text(edit.text, edit.target_new)])
    assert abs(loss - about["loss"]) < 1e-4
    for name, (left, right) in changes.items():
        assert close(left[0].T @ right[0], theirs[f"delta/{name}"]), name


def malmen_names(network: MALMENNetwork) -> Iterator[tuple[torch.nn.Parameter, str]]:
    """The parameters of the blocks with their names in the authors' code."""
    names = {"down": "A", "up": "B", "bias": "bias", "scale": "scale.weight", "shift": "shift.weight"}
    for kind, blocks in network.transforms.items():
        for i, block in enumerate(blocks):
            for name, other in names.items():
                yield getattr(block, name), f"{shape_of(kind)}.blocks.{i}.{other}"


def test_malmen_solves_and_differentiates_as_the_authors_do():
    lm = LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)
    about, theirs = json.loads((GOLDEN / "malmen.json").read_text()), load_file(GOLDEN / "malmen.safetensors")
    edits = [Edit(prompt, target_new=answer) for prompt, answer in about["edits"]]
    names = [lm.parts.value[0], lm.parts.value[1]]
    network = MALMENNetwork(MALMEN.paper("gpt-j-6b", layers=[0, 1], rank=4), lm)
    network.names = names  # theirs changes the value matrices only
    network.step = torch.nn.Parameter(torch.zeros(2))
    network.stiffness = torch.nn.Parameter(torch.zeros(2))
    network.groups.scale = dict.fromkeys(names, 1.0)

    rows = lm.encode([Text(edit.text, edit.target_new) for edit in edits])
    factors, _ = flat_factors(lm, names, rows, answers_only=True)
    factors = {name: (k, g / len(edits)) for name, (k, g) in factors.items()}  # their loss is a mean, ours a sum
    prefix = "network/(40, 32)."
    norm, count = network.norms["32x40"], theirs[f"{prefix}normalizer.n"][0]
    norm.load_state_dict(
        {
            "count": count,
            "mean": theirs[f"{prefix}normalizer.mean"],
            "squares": theirs[f"{prefix}normalizer.std"].square() * (count - 1),
        }
    )
    del network.transforms["40x32"]
    with torch.no_grad():
        for own, name in malmen_names(network):
            own.copy_(theirs[f"network/{name}"])
        network.step.copy_(theirs[f"{prefix}lr.weight"][:, 0])
        network.stiffness.copy_(theirs[f"{prefix}lamda.weight"][:, 0])

    deltas = {name: v.T @ network.weigh(name, factors[name][0]) for name, v in network(factors).items()}
    for name in names:
        assert close(deltas[name], theirs[f"delta/{name}"], 5e-4), name

    # The gradient of the answers' loss on the changed model, by every parameter.
    changes = {name: delta.detach().requires_grad_() for name, delta in deltas.items()}
    scored = ScoredTokens(lm, rows, [predictions(row, row.prompt_length) for row in rows], None)
    with delta_added(lm, changes):
        loss = scored.nll().mean()
    assert abs(loss.item() - about["loss_after"]) < 1e-3
    loss.backward()
    surrogate(network, factors, changes).backward()
    for own, name in malmen_names(network):
        assert close(own.grad, theirs[f"gradient/{name}"], 2e-3), name
    assert close(network.step.grad, theirs["gradient/(40, 32).lr.weight"][:, 0], 2e-3)
    assert close(network.stiffness.grad, theirs["gradient/(40, 32).lamda.weight"][:, 0], 2e-3)
