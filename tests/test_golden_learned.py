"""Methods that learn to edit against the authors' code (tests/golden/README.md)."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from reknow import LM, MEND, Edit, UltraEdit
from reknow.editors import Editor, case_keys
from reknow.gradients import flat_factors
from reknow.tokens import Text
from reknow.transform import GradientNetwork
from test_golden import GOLDEN, close


def test_mend_transforms_gradients_as_the_authors_do(tmp_path):
    lm = LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)
    about, theirs = json.loads((GOLDEN / "mend.json").read_text()), load_file(GOLDEN / "mend.safetensors")
    method = MEND(rank=4, layers=(0, 1))
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
        for kind in ("40x32", "32x40"):
            out, inside = map(int, kind.split("x"))
            transform, prefix = network.transforms[kind], f"network/({inside}, {out})."
            mean, squares = (
                torch.cat([theirs[f"{prefix}u_{name}"], theirs[f"{prefix}v_{name}"]]) for name in ("mean", "s")
            )
            assert float(transform.norm.count) == float(theirs[f"{prefix}k"])
            assert close(transform.norm.mean, mean) and close(transform.norm.squares, squares)
            for i, block in enumerate(transform.blocks):
                names = {"left": "u", "right": "v", "bias": "bias", "scale": "mode_scale.weight"}
                for name, other in (names | {"shift": "mode_shift.weight"}).items():
                    getattr(block, name).copy_(theirs[f"{prefix}mlp.layers.{i}.{other}"])
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
    patch = UltraEdit(layers=(1,), learning_rate_absolute=about["lr"], least_tokens=2).edit(lm, edits)
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
