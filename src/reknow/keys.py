"""Keys and states at the subject's last token, of the model as it is now (MEMIT, arXiv 2210.07229, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reknow.datasets import load_facts
from reknow.edits import Edit
from reknow.tokens import Row, Text
from reknow.trace import by_row, recorded

if TYPE_CHECKING:
    from reknow.lm import LM
    from reknow.values import Site

ALIKE = 8
"""Facts of one wording that tell how far apart such questions lie."""

SLIVER = 1e-5
"""What keeps two radii that meet apart, in the unit of distances."""
SAME = 1e-3
"""Keys that are closer, in the unit of distances, are the same prompt in another batch."""


def subject_keys(lm: LM, edits: Sequence[Edit], layer: int, contexts: Sequence[str]) -> Tensor:
    """Input of layer `layer`'s value matrix: the mean of the bare prompt's and of the prefixed prompts' mean.

    Args:
        contexts: texts to put before the prompt; the first must be "" (the bare prompt).

    Returns:
        (facts, in), float64.
    """
    name = lm.parts.value[layer]
    states = lm.read(*_places(lm, edits, contexts), inputs=[name])[name].double()
    states = states.view(len(edits), len(contexts), -1)  # (facts, contexts, in)
    if len(contexts) == 1:
        return states[:, 0]
    return (states[:, 0] + states[:, 1:].mean(1)) / 2


def subject_states(lm: LM, edits: Sequence[Edit], layer: int, site: Site) -> Tensor:
    """Output of layer `layer`'s block or value matrix at the bare prompt, as `values.find_values` measures it.

    Returns:
        (facts, hidden), float64.
    """
    block = site == "block" and lm.parts.residual_identity
    name = lm.parts.blocks[layer] if block else lm.parts.value[layer]
    return lm.read(*_places(lm, edits, [""]), outputs=[name])[name].double()


def spread(lm: LM, layer: int) -> float:
    """How far apart questions of the same wording lie: root mean square distance between the inputs of the layer's
    value matrix at the last tokens of bundled facts that differ in their subjects, on the base model. What a memory
    has to tell apart; in this unit distances mean much the same in every model.
    """
    memo = ("spread", layer)
    if memo not in lm.memo:
        alike: dict[str, list[str]] = {}
        for fact in load_facts("pararel"):
            alike.setdefault(fact.prompt, []).append(fact.text)
        groups = [texts[:ALIKE] for texts in alike.values() if len(texts) >= ALIKE]
        rows = lm.encode([Text(text) for texts in groups for text in texts])
        name = lm.parts.value[layer]
        with lm.unpatched():
            keys = lm.read(rows, [len(row.ids) - 1 for row in rows], inputs=[name])[name].double()
        apart = keys.view(len(groups), ALIKE, -1).var(1).sum(-1)  # (groups,)
        lm.memo[memo] = (float((2 * apart.mean()).sqrt()),)
    return lm.memo[memo][0]


def prompt_states(lm: LM, rows: Sequence[Row], module: str) -> tuple[Tensor, Tensor]:
    """The module's input and output at each prompt's last token. (rows, in), (rows, out), float32"""
    prompts = [Row(row.ids[: row.prompt_length], row.prompt_length) for row in rows]
    found = lm.read(prompts, [len(row.ids) - 1 for row in prompts], inputs=[module], outputs=[module])
    return found[module].float(), found[f"{module}:out"].float()


@torch.no_grad()
def prompt_inputs(lm: LM, rows: Sequence[Row], module: str) -> tuple[Tensor, Tensor]:
    """The module's input at all tokens of a few texts, and which of them belong to the prompt.

    Returns:
        (rows, columns, in), float32; (rows, columns), boolean.
    """
    batch = lm.pad(rows)
    with recorded(lm.model, inputs=[module], stop=True) as (seen, _):
        lm.forward(batch.ids, batch.mask, batch.positions, None, ends=batch.ends)
    columns = torch.arange(batch.ids.shape[1], device=lm.device)
    return by_row(seen[module], len(rows)).float(), (columns < batch.ends[:, None]) & batch.mask.bool()


def _places(lm: LM, edits: Sequence[Edit], contexts: Sequence[str]) -> tuple[list[Row], list[int]]:
    """Rows that end with the subject, and the index of its last token: what follows cannot change its states."""
    texts = []
    for edit in edits:
        assert edit.subject is not None, "methods check that every edit has a subject"
        texts += [Text.of(edit.prompt, edit.subject, edit.target_new, prefix=prefix) for prefix in contexts]
    rows, last = [], []
    for row in lm.encode(texts):
        assert row.subject_last is not None, "the text names its subject"
        last.append(row.subject_last)
        rows.append(Row(row.ids[: last[-1] + 1], last[-1] + 1))
    return rows, last
