"""Counting operations and timing phases."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from reknow.model.fast_modules import product

PHASES = {
    "lower blocks, left columns": [("reknow.model.replay", "BlockReplay.__init__")],
    "search of δ": [("reknow.editing.values", "_descend")],
    "keys and states": [("reknow.editing.keys", "Subjects.keys"), ("reknow.editing.keys", "Subjects.states")],
    "least squares": [
        ("reknow.editing.band", "least_squares"),
        ("reknow.editing.band", "as_delta"),
        ("reknow.methods.rome", "rank_one"),
    ],
    "putting patches on and off": [("reknow.patching.applied", "Applied.set")],
    "making patches": [("reknow.editing.band", "make_patch"), ("reknow.methods.rome", "make_patch")],
}
"""Functions whose time and operations are shown by themselves; what they call of one another is not counted twice."""


def now() -> float:
    """Seconds of processor time; once a GPU is used, of the clock, when that has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(run: Callable):
    """(what it gives, seconds)."""
    start = now()
    found = run()
    return found, now() - start


def total_flops(run: Callable):
    """(what it gives, floating-point operations of its matrix products). Attention's own two products are left out,
    which torch's counter does not know on a CPU: some per cent at these lengths."""
    with counter() as counted:
        found = run()
    return found, counted.get_total_flops()


def counter() -> FlopCounterMode:
    """Torch's counter of operations, which is told of oneDNN's products too."""

    def count(states, weight, *_, **__) -> int:
        return 2 * math.prod(states[:-1]) * weight[0] * weight[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: count})


def matmul_rate(like: torch.Tensor, repeats: int = 10, size: int | None = None) -> float:
    """FLOP/s of a large matrix product of the dtype and on the device of a weight: torch's own."""
    size = size or (2048 if like.device.type == "cpu" else 8192)
    a, b, product = (torch.randn(size, size).to(like) for _ in range(3))  # new memory would be timed with it

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=product)

    multiply()
    return 2 * size**3 * repeats / timed(multiply)[1]


def onednn_rate(repeats: int = 10, size: int = 2048) -> float:
    """The same of float32 on a CPU by oneDNN, as `reknow` has it."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    _, seconds = timed(lambda: [product(a, b) for _ in range(repeats + 1)][1:])
    return 2 * size**3 * (repeats + 1) / seconds


def phases(run: Callable) -> dict[str, dict[str, float]]:
    """Per phase, and in `all`, the seconds of one run and the operations of another."""
    seconds = by_phase(run, now)
    with counter() as counted:
        flops = by_phase(run, counted.get_total_flops)
    return {name: {"seconds": seconds[name], "flops": flops[name]} for name in seconds}


def by_phase(run: Callable, clock: Callable[[], float]) -> dict[str, float]:
    """How far `clock` went in each phase; `other` is the rest."""
    spent, inside = dict.fromkeys(PHASES, 0.0), [0.0]
    with ExitStack() as stack:
        for phase, places in PHASES.items():
            for module, name in places:
                stack.enter_context(_watched(module, name, phase, spent, inside, clock))
        start = clock()
        run()
        whole = clock() - start
    return {"all": whole, **spent, "other": whole - sum(spent.values())}


@contextmanager
def _watched(module: str, name: str, phase: str, spent: dict[str, float], inside: list[float], clock):
    """While open, calls of a function are added to its phase, less what they spend in other watched functions."""
    holder = importlib.import_module(module)
    *classes, name = name.split(".")
    for part in classes:
        holder = getattr(holder, part)
    own = getattr(holder, name)

    def call(*args, **kwargs):
        inside.append(0.0)
        start = clock()
        try:
            return own(*args, **kwargs)
        finally:
            took = clock() - start
            spent[phase] += took - inside.pop()
            inside[-1] += took

    setattr(holder, name, call)
    try:
        yield
    finally:
        setattr(holder, name, own)
