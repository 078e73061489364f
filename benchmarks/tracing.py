"""Causal tracing: batched restarts against one full pass per cell, side by side in one process.

    python benchmarks/tracing.py                 # the bundled GPT-2-shaped model
    python benchmarks/tracing.py --shape 124M    # GPT-2's size, random weights

Both trace the same prompt (hidden states, MLP and attention windows, all tokens and layers, 10 noise samples). The
plain side is timed on `--cells` cells, spread over all, and scaled up, since each costs the same. Seconds are
processor seconds of one thread, so that other work on the machine counts little; passes count the rows × columns that
go through blocks, in units of one corrupted pass.
"""

from __future__ import annotations

import argparse
import time

import torch

from reknow import LM
from reknow.model.tokens import Text
from reknow.tracing.causal import Tracing
from reknow.tracing.restoration import Prompt, list_restorations
from speed import opened


def counted(lm: LM) -> list[int]:
    """A list that grows by the tokens (rows × columns) of every call of a value matrix."""
    tokens: list[int] = []
    for name in lm.parts.value:
        matrix = lm.model.get_submodule(name)
        matrix.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[:-1].numel()))
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["demo", "124M"], default="demo")
    parser.add_argument("--cells", type=int, default=30, help="cells of the plain side that are run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm, settings = opened(options.shape), Tracing()
    (row,) = lm.encode([Text.of("The mother tongue of {} is", "Danielle Darrieux")])
    size = (settings.samples, row.subject_last - row.subject_first + 1, lm.parts.hidden_size)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.1
    window = settings.window_of(lm.layers)
    runs = [run for kind in settings.kinds for run in list_restorations(kind, lm.layers, window)]
    tokens = counted(lm)

    Prompt(lm, row, noise)  # warm
    tokens.clear()
    start = time.process_time()
    prompt = Prompt(lm, row, noise)
    found = dict(prompt.restored(range(prompt.width), runs))
    fast, fast_tokens = time.process_time() - start, sum(tokens)

    cells = [(column, number) for column in range(prompt.width) for number in range(len(runs))]
    some = cells[:: max(1, len(cells) // options.cells)]
    tokens.clear()
    start = time.process_time()
    plain = {(column, number): prompt.run_full_pass(column, runs[number]) for column, number in some}
    scale = len(cells) / len(some)
    slow, slow_tokens = (time.process_time() - start) * scale, sum(tokens) * scale

    one = settings.samples * prompt.width * lm.layers
    error = max(abs(found[column][number] / value - 1) for (column, number), value in plain.items())
    print(
        f"{lm.layers} layers, {prompt.width} tokens ({size[1]} of the subject), {len(cells)} cells, window {window}"
    )
    print(f"plain:  {slow_tokens / one:7.1f} passes  {slow:7.2f} s  (timed on {len(some)} cells)")
    print(f"reknow: {fast_tokens / one:7.1f} passes  {fast:7.2f} s")
    print(f"ratio:  {slow_tokens / fast_tokens:7.1f}         {slow / fast:7.1f}")
    print(f"largest relative difference between the two: {error:.0e}")


if __name__ == "__main__":
    main()
