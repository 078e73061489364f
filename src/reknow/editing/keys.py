"""Keys and states at the subject's last token, of the model as it is now (MEMIT, arXiv 2210.07229, Algorithm 1)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from reknow.editing.sinks import subject_texts
from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.beginnings import read_inputs
from reknow.model.exact import exact
from reknow.model.hooks import added_at, output_edited
from reknow.model.tokens import EncodedText
from reknow.patching.patches import Patch
from reknow.registry import NEED_A_SUBJECT

__all__ = ["Site", "Subjects", "held_keys", "kept_by_earlier", "kept_keys"]

_KEYS = "keys."
_ONE_KEY = 0.99
"""Cosine from which two keys count as one; behind the same beginning a subject's are the same to rounding."""

Site = Literal["value", "block"]
"""Where a state is read: the value matrix's output, or the block's where an addition arrives there unchanged."""


class Subjects:
    """The last token of the subject in the prompts of some edits, by themselves and behind other texts.

    A subject that is an attention sink (`reknow.editing.sinks`) is never read by itself.

    Args:
        contexts: texts to put before the prompt; the first must be "" (the bare prompt).
        rephrased: whether an edit's rephrasings are read too.
    """

    def __init__(self, lm: LM, edits: Sequence[Edit], contexts: Sequence[str], *, rephrased: bool = False):
        texts = subject_texts(lm, edits, contexts, rephrased=rephrased)
        self._lm, self._counts, self._last = lm, [len(own) for own in texts], list[int]()
        self._rows: list[EncodedText] = []
        for row in lm.encode([text for own in texts for text in own]):
            assert row.subject_last is not None, "the text names its subject"
            self._last.append(row.subject_last)
            # What follows cannot change the states of the subject.
            self._rows.append(EncodedText(row.ids[: row.subject_last + 1], row.subject_last + 1))

    def keys(self, layer: int) -> Tensor:
        """Input of layer `layer`'s value matrix: the mean of the bare prompt's and of the mean of the other texts'.

        Returns:
            (facts, in), float64.
        """
        states = read_inputs(self._lm, self._rows, self._last, self._lm.parts.value[layer])
        each = exact(states).split(self._counts)  # of each fact (texts, in)
        return torch.stack([own[0] if len(own) == 1 else (own[0] + own[1:].mean(0)) / 2 for own in each])

    def states(self, layer: int, site: Site) -> Tensor:
        """Output of layer `layer`'s block or value matrix at the bare prompt, as `values.find_values` measures it.

        Returns:
            (facts, hidden), float64.
        """
        name, (rows, last) = self._site(layer, site), self._bare()
        return exact(self._lm.read(rows, last, outputs=[name]).outputs[name])

    def carried_forward(self, delta: Tensor, layers: Sequence[int], site: Site) -> list[Tensor]:
        """The same at each of the layers, with an addition at the first of them (MEMIT-FE, arXiv 2605.00358).

        Args:
            delta: (facts, hidden).

        Returns:
            One (facts, hidden) per layer, float64.
        """
        lm, names = self._lm, [self._site(layer, site) for layer in layers]
        module = lm.model.get_submodule(names[0])
        found = []
        for own, row, last in zip(delta, *self._bare(), strict=True):
            with output_edited(module, added_at(own[None].to(lm.dtype), last)):
                read = lm.read([row], [last], outputs=names).outputs
            found.append([exact(read[name][0]) for name in names])
        return [torch.stack(states) for states in zip(*found, strict=True)]

    def _site(self, layer: int, site: Site) -> str:
        parts = self._lm.parts
        return parts.blocks[layer] if site == "block" and parts.residual_identity else parts.value[layer]

    def _bare(self) -> tuple[list[EncodedText], list[int]]:
        """The bare prompts, and where their subjects end."""
        first = [end - count for end, count in zip(accumulate(self._counts), self._counts, strict=True)]
        return [self._rows[i] for i in first], [self._last[i] for i in first]


def kept_by_earlier(lm: LM, name: str) -> list[Tensor]:
    """What the applied patches of methods that edit at the subject keep under the name, in the order of the stack."""
    states = [patch.state for patch in lm.patches if patch.method in NEED_A_SUBJECT]
    return [state[name] for state in states if name in state]


def kept_keys(module: str) -> str:
    """The name under which a patch keeps the keys of its edits at a value matrix. (edits, in), float32"""
    return f"{_KEYS}{module}"


def held_keys(lm: LM, method: str, edits: Sequence[Edit], module: str, keys: Tensor) -> list[Tensor]:
    """The keys that applied patches keep at a value matrix, each (its edits, in), whose outputs an edit holds.

    Warns where an edit has such a key itself, and where a patch of the method keeps none: it was merged, or is of
    other layers.

    Args:
        keys: of the edits. (edits, in)
    """
    for patch in lm.patches:
        if (held := patch.state.get(kept_keys(module))) is not None:
            _warn_of_like_keys(method, edits, keys, patch, held)
        elif patch.method == method and "merged" in patch.notes and module in patch.deltas:
            warnings.warn(
                f"{patch.label} keeps no keys, since it was merged, so what it wrote is not held: apply the patches "
                "that it was merged from",
                stacklevel=1,  # said once, whoever calls
            )
        elif patch.method == method and any(name.startswith(_KEYS) for name in patch.state):
            warnings.warn(
                f"{patch.label} wrote in {', '.join(patch.deltas)}, so what it wrote is not held in {module}: set "
                "layers as there",
                stacklevel=1,
            )
    return kept_by_earlier(lm, kept_keys(module))


def _warn_of_like_keys(method: str, edits: Sequence[Edit], keys: Tensor, patch: Patch, held: Tensor) -> None:
    """keys and held: (edits, in), (edits of the patch, in)"""
    own, theirs = (torch.nn.functional.normalize(exact(each).to(keys.device)) for each in (keys, held))
    likeness, which = (own @ theirs.T).max(1)
    for edit, cosine, j in zip(edits, likeness.tolist(), which.tolist(), strict=True):
        earlier = patch.edits[j]
        if cosine > _ONE_KEY and (edit.text, edit.target_new) != (earlier.text, earlier.target_new):
            warnings.warn(
                f"{method} holds what earlier edits wrote, and {edit.text!r} has the key of {earlier.text!r} in "
                f"{patch.label}, so it is made in part or not at all: take that patch off first, or take rome, which "
                "holds nothing",
                stacklevel=1,
            )
