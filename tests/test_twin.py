"""What runs where tensors may lie apart, on the second device of `twin`, in processes of their own that have it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
METHODS = ("rome", "alphaedit", "ice", "grace", "mend")
"""One of each machinery: search, null space, fine-tuning, memories, learned ones. Not those of peft, which writes a
tensor's memory to files, and `ke`, whose network is one operation to torch: neither knows tensors made in Python."""

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def backend():
    import torch.utils.backend_registration as registration

    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices written in Python")


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "REKNOW_TEST_DEVICE": "twin",
        "PYTHONPATH": f"{HERE}:{HERE / 'methods'}:{HERE.parent / 'src'}",
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=HERE.parent, env=environment, capture_output=True, text=True
    )


def test_tensors_that_lie_apart_are_refused_and_gradients_are_right():
    done = run(
        "-c",
        """
import torch, twin
here, there = torch.arange(6.0).view(2, 3), torch.arange(6.0, device="twin").view(2, 3)
for mixed in (lambda: here + there, lambda: there @ here.T, lambda: here[there.long()[0]], lambda: there.numpy()):
    try:
        mixed()
    except (RuntimeError, TypeError) as error:
        assert "device" in str(error), error
    else:
        raise AssertionError("it was not refused")
weight = torch.ones(3, 2, device="twin", requires_grad=True)
(there[torch.tensor([1])] @ weight).square().sum().mul(torch.tensor(0.5)).backward()
assert weight.grad.device == there.device and weight.grad.tolist() == [[36.0] * 2, [48.0] * 2, [60.0] * 2]
assert (there.cpu() + here).device.type == "cpu" and there.float().to("cpu").tolist() == here.tolist()
print("all of it")
""",
    )
    assert done.stdout == "all of it\n", done.stderr


def test_methods_keep_to_their_device():
    names = " or ".join(METHODS)
    tests = ["tests/methods/test_contract.py", "-k", f"test_contract and llama and ({names}) and not merge"]
    done = run("-m", "pytest", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]


def test_methods_keep_to_the_devices_of_their_layers():
    done = run("-m", "pytest", "-p", "no:cacheprovider", "tests/methods/test_spread.py")
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) > 2 * len(METHODS), done.stdout[-3000:]


def test_a_device_without_float64_is_enough():
    """Apple's, for which the twin stands in here: what needs float64 is computed on the CPU, and comes back."""
    done = run(
        "-c",
        """
import torch, twin
from torch.utils._pytree import tree_leaves
from reknow.model import exact
from test_contract import EDIT, OTHER, make_lm, nll, quick

exact._WITHOUT = ("twin",)
dispatch = twin.Twin.__torch_dispatch__.__func__

def refusing(cls, *call):
    found = dispatch(cls, *call)
    doubles = [t for t in tree_leaves(found) if isinstance(t, twin.Twin) and t.dtype == torch.float64]
    assert not doubles, f"{call[0]} gives float64"
    return found

twin.Twin.__torch_dispatch__ = classmethod(refusing)
lm = make_lm("llama")
for name in ("rome", "memit", "alphaedit", "ft-m", "grace", "malmen", "ultraedit", "stableedit", "memoir"):
    with lm.patched(quick(name, lm, steps=3).edit(lm, [EDIT, OTHER])):
        nll(lm, EDIT)
print("all of it")
""",
    )
    assert done.stdout.endswith("all of it\n"), done.stderr[-3000:]
