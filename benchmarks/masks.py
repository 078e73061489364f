"""How much the masks of MEMOIR's edits and of their probes have in common, and how many probes open the memory.

    python benchmarks/masks.py [MODEL]

Facts 1 to 20 and 21 to 30 of CounterFact that the model knows, and the first 40 records of zsRE. Nothing has to be
learned: a mask is of what enters the matrix. Shares are of a mask's columns; `open` are the probes that have the
default threshold's share or more.
"""

import sys

import torch

from reknow import LM, MEMOIR, load_cases
from reknow.memories.distances import prompt_inputs
from reknow.model.tokens import Text
from reknow.tracing.known import known_cases

LAYERS, KINDS = (3, 14, 25), ("generalization", "locality")


def shares(lm, layer, cases):
    """(kind, the share of its edit's mask that the mask of each probe of that kind has too (probes,))"""
    patch = MEMOIR(layer=layer, steps=1, context_groups=()).edit(lm, [case.edit for case in cases])
    memory, module = MEMOIR.running_memory(lm, [patch]), lm.parts.value[layer]
    for kind in KINDS:
        asked = [(i, probe.prompt) for i, case in enumerate(cases) for probe in case.questions if probe.kind == kind]
        masks = [memory.hash.masks(*prompt_inputs(lm, lm.encode([Text(text)]), module)) for _, text in asked]
        yield kind, (torch.cat(masks) & memory.stored[[i for i, _ in asked]]).sum(1) / memory.hash.kept


if __name__ == "__main__":
    torch.set_num_threads(1)
    lm = LM(*sys.argv[1:] or ["demo:smollm2"])
    known, zsre = known_cases(lm, load_cases("counterfact")), load_cases("zsre", limit=40)
    print("| layer | facts | probes | number | 10 % | 50 % | 90 % | open |\n|---|---|---|---|---|---|---|---|")
    for layer in LAYERS:
        for name, cases in {"1 to 20": known[:20], "21 to 30": known[20:30], "zsRE": zsre}.items():
            for kind, found in shares(lm, layer, cases):
                cells = [f"{100 * q:.0f}" for q in found.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()]
                opened = f"{100 * float((found >= MEMOIR.threshold).float().mean()):.1f} %"
                print("|", " | ".join([str(layer), name, kind, str(len(found)), *cells, opened]), "|", flush=True)
