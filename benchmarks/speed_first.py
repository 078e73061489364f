"""The first edit of a model on which neither side has ever worked: statistics, contexts, edit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from easyedit import EasyEdit
from reknow import LM, ROME
from reknow.datasets.text import text_source
from reknow.editing.covariance import enough_tokens
from reknow.edits import Case
from reknow.model.tokens import Text, encode
from speed_work import timed

THEIR_SAMPLE = 100_000
"""Texts of Wikipedia that EasyEdit's settings of ROME read (`mom2_n_samples`)."""


def first(lm: LM, theirs: EasyEdit, cases: Sequence[Case], layer: int) -> dict:
    """Seconds of each part on both sides, from the same text, in an empty cache; the layer is given."""
    method, edit = ROME(layer=layer), cases[0].edit
    texts, tokens = texts_of(lm, enough_tokens(lm))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REKNOW_CACHE"] = str(Path(folder) / "ours")
        for key in [key for key in lm.memo if key[0] in ("contexts of text", "covariance")]:
            del lm.memo[key]
        _, contexts = timed(lambda: method.contexts(lm))
        _, statistics = timed(lambda: method.whitening(lm, layer))
        patch, search = timed(lambda: method.edit(lm, [edit]))
        ours = {"statistics": statistics, "contexts": contexts, "edit": search}
        made, parts = theirs.first(edit, layer, texts, Path(folder) / "theirs")
    said = {}
    for label, one in (("reknow", patch), ("EasyEdit", made.patch)):
        with lm.patched(one):
            (score,) = lm.score([edit.text], [edit.target_new])
        said[label] = score.said
    return {
        "layer": layer,
        "tokens": tokens,
        "texts": len(texts),
        "their sample": THEIR_SAMPLE,
        "seconds": {"reknow": ours, "EasyEdit": parts},
        "said": said,
    }


def texts_of(lm: LM, tokens: int) -> tuple[list[str], int]:
    """The first texts of the bundled sample that have so many tokens together, and how many they have."""
    texts = [*text_source().texts()]
    lengths = [len(row.ids) for row in encode(lm.tokenizer, [Text(text) for text in texts])]
    count = next((i for i, read in enumerate(accumulate(lengths), 1) if read >= tokens), len(texts))
    return texts[:count], sum(lengths[:count])
