"""What runs where tensors may lie apart, on the second device of `twin`, in processes of their own that have it."""

from __future__ import annotations

import os
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
    environment = os.environ | {"REKNOW_TEST_DEVICE": "twin", "PYTHONPATH": f"{HERE}:{HERE.parent / 'src'}"}
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
