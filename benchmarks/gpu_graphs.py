"""Passes of the search as CUDA graphs: recorded once for a batch of facts, then sent to the GPU as one order.

A pass of one fact through the blocks of a large model is thousands of small kernels, and to launch them takes longer
than to run them. A recorded pass, forward and back, is launched at once. What it reads (keys and values, masks,
places) lies where it lay when it was recorded; the addition δ alone is copied in.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

from reknow.model.replay import BlockReplay
from speed_work import timed


@contextmanager
def captured_passes(capture: Callable | None = None):
    """While open, every replay of a batch of rows is recorded at its first pass and repeated in those that follow.

    Args:
        capture: what records a function of one tensor, `torch.cuda.make_graphed_callables` or one that is called
            alike.

    Yields:
        Seconds that each recording took; they are part of the search's.
    """
    own, took = BlockReplay.__call__, list[float]()
    record = torch.cuda.make_graphed_callables if capture is None else capture

    def call(replay: BlockReplay, delta: Tensor, rows: Tensor, columns: Tensor, *, attention=None, seen=None):
        if attention is not None or seen is not None or not delta.requires_grad:
            return own(replay, delta, rows, columns, attention=attention, seen=seen)
        kept = vars(replay).get("_captured")
        if kept is None or kept[0] is not rows or kept[1] is not columns:  # a selection of rows is another batch
            example = torch.zeros_like(delta).requires_grad_()

            def make():
                return record(lambda added: own(replay, added, rows, columns), (example,), num_warmup_iters=1)

            repeated, seconds = timed(make)
            took.append(seconds)
            kept = vars(replay)["_captured"] = (rows, columns, repeated)
        return kept[2](delta)

    BlockReplay.__call__ = call
    try:
        yield took
    finally:
        BlockReplay.__call__ = own
        gc.collect()  # a replay and its recording hold each other
