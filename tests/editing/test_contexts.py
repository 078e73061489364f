"""Texts to put before a prompt: how general text begins, or what the model says by itself."""

from __future__ import annotations

import pytest

from reknow import ROME, method
from reknow.datasets.text import text_source
from reknow.editing.contexts import sample_contexts, text_contexts


def test_contexts_are_how_general_text_begins(lm):
    found = text_contexts(lm, ((2, 5), (1, 10)), text_source(), seed=0)
    texts = [text.strip() for text in text_source().texts()]
    assert found[0] == "" and len(set(found)) == 4 and all(text.endswith(". ") for text in found[1:])
    for text, tokens in zip(found[1:], (5, 5, 10), strict=True):
        begun = [
            lm.tokenizer(one, add_special_tokens=False)["input_ids"][:tokens]
            for one in texts
            if one.startswith(text[:-2])
        ]
        assert text[:-2] in [lm.tokenizer.decode(ids).rstrip(" .,;") for ids in begun]
    assert text_contexts(lm, ((2, 5), (1, 10)), text_source(), seed=0) == found
    assert text_contexts(lm, ((2, 5), (1, 10)), text_source(), seed=1) != found


def test_few_short_texts_come_again_and_end_in_their_own_script(lm):
    found = text_contexts(lm, ((3, 100),), text_source(["北京是中国的首都", "Short."]))
    assert sorted(set(found)) == ["", "Short. ", "北京是中国的首都。 "] and len(found) == 4


def test_contexts_come_from_the_text_of_the_covariance_or_from_the_model(lm, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("One text alone, and no more.\n", encoding="utf-8")
    groups = ((1, 3),)
    own = ROME(layer=0, context_groups=groups, covariance_text=str(file)).contexts(lm)
    assert own[0] == "" and "One text alone".startswith(own[1].removesuffix(". "))
    written = ROME(layer=0, context_groups=groups, context_source="model").contexts(lm)
    assert written == sample_contexts(lm, groups) != own


@pytest.mark.parametrize("name", ["rome-paper:gpt2-xl", "memit-paper:gpt2-xl", "pmet-paper:gpt-j-6b"])
def test_papers_let_the_model_write_them(lm, name):
    assert method(name).resolve(lm).context_source == "model"
