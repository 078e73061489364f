"""Keys and states at the subject's last token, of the model as it is now (MEMIT, arXiv 2210.07229, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from reknow.editing.sinks import avoid_sinks
from reknow.edits import Edit
from reknow.lm import LM
from reknow.model.beginnings import read_inputs
from reknow.model.exact import exact
from reknow.model.tokens import EncodedText, Text

__all__ = ["Site", "Subjects"]

Site = Literal["value", "block"]
"""Where a state is read: the value matrix's output, or the block's where an addition arrives there unchanged."""


class Subjects:
    """The last token of the subject in the prompts of some edits, by themselves and behind other texts.

    A subject that is an attention sink (`reknow.editing.sinks`) is never read by itself.

    Args:
        contexts: texts to put before the prompt; the first must be "" (the bare prompt).
    """

    def __init__(self, lm: LM, edits: Sequence[Edit], contexts: Sequence[str]):
        prefixes = avoid_sinks(lm, edits, contexts)
        texts = [Text.about(edit, prefix) for edit, own in zip(edits, prefixes, strict=True) for prefix in own]
        self._lm, self._contexts, self._last = lm, len(contexts), list[int]()
        self._rows: list[EncodedText] = []
        for row in lm.encode(texts):
            assert row.subject_last is not None, "the text names its subject"
            self._last.append(row.subject_last)
            # What follows cannot change the states of the subject.
            self._rows.append(EncodedText(row.ids[: row.subject_last + 1], row.subject_last + 1))

    def keys(self, layer: int) -> Tensor:
        """Input of layer `layer`'s value matrix: the mean of the bare prompt's and of the prefixed prompts' mean.

        Returns:
            (facts, in), float64.
        """
        states = read_inputs(self._lm, self._rows, self._last, self._lm.parts.value[layer])
        states = states.view(-1, self._contexts, states.shape[1])  # (facts, contexts, in)
        states = exact(states)
        bare = states[:, 0]
        return bare if self._contexts == 1 else (bare + states[:, 1:].mean(1)) / 2

    def states(self, layer: int, site: Site) -> Tensor:
        """Output of layer `layer`'s block or value matrix at the bare prompt, as `values.find_values` measures it.

        Returns:
            (facts, hidden), float64.
        """
        parts, bare = self._lm.parts, slice(None, None, self._contexts)
        name = parts.blocks[layer] if site == "block" and parts.residual_identity else parts.value[layer]
        return exact(self._lm.read(self._rows[bare], self._last[bare], outputs=[name]).outputs[name])
