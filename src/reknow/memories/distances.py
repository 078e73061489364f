"""What a memory compares prompts by: the input of a matrix, and how far apart two of them are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reknow.datasets.facts import load_facts
from reknow.lm import LM
from reknow.model.exact import exact
from reknow.model.hooks import by_row, recorded
from reknow.model.tokens import EncodedText, Text

__all__ = ["distance_scale", "prompt_inputs", "prompt_states"]

_FACTS_PER_PROMPT = 8
"""Facts asked with the same prompt that tell how far apart such questions lie."""


def distance_scale(lm: LM, module: str) -> float:
    """How far apart questions of the same wording lie: root mean square distance between the inputs of a matrix
    at the last tokens of bundled facts that differ in their subjects, on the base model. What a memory
    has to tell apart; in this unit distances mean much the same in every model.
    """

    def measure() -> float:
        alike: dict[str, list[str]] = {}
        for fact in load_facts("pararel"):
            alike.setdefault(fact.prompt, []).append(fact.text)
        groups = [texts[:_FACTS_PER_PROMPT] for texts in alike.values() if len(texts) >= _FACTS_PER_PROMPT]
        rows = lm.encode([Text(text) for texts in groups for text in texts])
        with lm.unpatched():
            keys = exact(lm.read(rows, [len(row.ids) - 1 for row in rows], inputs=[module]).inputs[module])
        apart = keys.view(len(groups), _FACTS_PER_PROMPT, -1).var(1).sum(-1)  # (groups,)
        return float((2 * apart.mean()).sqrt())

    return lm.cached(("distance_scale", module), measure)


def prompt_states(lm: LM, rows: Sequence[EncodedText], module: str) -> tuple[Tensor, Tensor]:
    """The module's input and output at each prompt's last token. (rows, in), (rows, out), float32"""
    prompts = [EncodedText(row.ids[: row.prompt_length], row.prompt_length) for row in rows]
    states = lm.read(prompts, [len(row.ids) - 1 for row in prompts], inputs=[module], outputs=[module])
    return states.inputs[module].float(), states.outputs[module].float()


@torch.no_grad()
def prompt_inputs(lm: LM, rows: Sequence[EncodedText], module: str) -> tuple[Tensor, Tensor]:
    """The module's input at all tokens of a few texts, and which of them belong to the prompt.

    Returns:
        (rows, columns, in), float32; (rows, columns), boolean.
    """
    batch = lm.pad(rows)
    with recorded(lm.model, inputs=[module], stop=True) as (seen, _):
        lm.forward(batch.ids, batch.mask, batch.positions, None, ends=batch.ends)
    columns = torch.arange(batch.ids.shape[1], device=lm.device)
    states, inside = by_row(seen[module], len(rows)), (columns < batch.ends[:, None]) & batch.mask.bool()
    return states.float(), inside.to(states.device)
