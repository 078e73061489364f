"""What keys are a mean over: prefixes, the user's rephrasings, both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import close, make_lm
from reknow import EMMET, MEMIT, PMET, ROME, AlphaEdit, Edit
from reknow.editing.values import find_values
from reknow.errors import EditRefused, InputError
from reknow.methods import method

EDIT = Edit(
    "The mother tongue of {} is",
    subject="Danielle Darrieux",
    target_new="English",
    rephrasings=("{} spoke the language", "The native language of {} is"),
)
OTHER = Edit("Where is {}? It is in", subject="Lima", target_new="Italy", rephrasings=["{} is a city in"])
QUICK = dict(covariance_tokens=500, steps=5, stop_probability=1.0, min_delta=0.0, context_groups=((2, 3),))
METHODS = [
    ROME(layer=1, **QUICK),
    ROME(layer=1, average_keys=True, **QUICK),
    EMMET(layer=1, **QUICK),
    MEMIT(layers=(0, 1), **QUICK),
    PMET(layers=(0, 1), **QUICK),
    AlphaEdit(layers=(0, 1), null_share=0.5, **QUICK),
]


@pytest.fixture(scope="module")
def gpt2():
    return make_lm("gpt2")


def asked_of(edit: Edit) -> list[Edit]:
    return [edit, *(replace(edit, prompt=text) for text in edit.rephrasings)]


@pytest.mark.parametrize(("which", "prefixes"), [("prefixes", True), ("rephrasings", False), ("both", True)])
def test_a_key_is_the_mean_over_what_is_asked_for(gpt2, which, prefixes):
    rome = ROME(layer=1, key_contexts=which, **QUICK)
    found = find_values(gpt2, [EDIT], 1, contexts := rome.contexts(gpt2), rome)
    assert len(contexts) == (3 if prefixes else 1)
    plain = ROME(layer=1, **QUICK)
    keys = [find_values(gpt2, [EDIT], 1, (text,), plain).key for text in contexts]
    if which != "prefixes":
        keys += [find_values(gpt2, [edit], 1, ("",), plain).key for edit in asked_of(EDIT)[1:]]
    assert close(found.mean_key, torch.stack(keys).mean(0))
    assert close(found.key, keys[0])


def test_the_answer_is_searched_behind_the_rephrasings_too(gpt2):
    def likelihood(which: str) -> torch.Tensor:
        """Of the answer behind each wording."""
        rome = ROME(layer=1, key_contexts=which, **QUICK | dict(steps=25, context_batches=1))
        with gpt2.patched(rome.edit(gpt2, [EDIT])):
            texts = [edit.text for edit in asked_of(EDIT)]
            return torch.tensor([score.nll for score in gpt2.score(texts, ["English"] * 3)])

    assert likelihood("rephrasings")[1:].mean() < likelihood("prefixes")[1:].mean()


@pytest.mark.parametrize("made", METHODS, ids=[f"{m.name}" for m in METHODS])
@pytest.mark.parametrize("which", ["rephrasings", "both"])
def test_edits_of_unlike_many_rephrasings_are_searched_together_as_alone(gpt2, made, which):
    made = replace(made, key_contexts=which)
    patches = made.edit_each(gpt2, [EDIT, OTHER])
    for edit, patch in zip([EDIT, OTHER], patches, strict=True):
        alone = made.edit(gpt2, [edit])
        for matrix, delta in patch.deltas.items():
            assert (delta.dense() - alone.deltas[matrix].dense()).norm() <= 1e-2 * delta.norm()


@pytest.mark.parametrize("name", ["rome", "memit", "memit-merge", "emmet", "pmet", "alphaedit"])
def test_without_rephrasings_one_sentence_says_so(gpt2, name):
    bare = replace(OTHER, rephrasings=())
    for which in ("rephrasings", "both"):
        with pytest.raises(
            EditRefused, match=r"expected rephrasings of every edit; 'Where is Lima\? It is in' has none"
        ):
            method(name, key_contexts=which).edit(gpt2, [EDIT, bare])
    with pytest.raises(InputError, match="key_contexts"):
        method(name, key_contexts="synonyms")


def test_a_rephrasing_without_the_subject_is_refused(gpt2):
    with pytest.raises(InputError, match="expected the subject 'Lima' once in the prompt; 'The city is in' does not"):
        ROME(key_contexts="both").edit(gpt2, [replace(OTHER, rephrasings=("The city is in",))])


def test_edits_that_share_an_addition_have_as_many_rephrasings(gpt2):
    twin = replace(EDIT, prompt="{} lives in", target_new="Peru", rephrasings=("{} is at home in",))
    merged = MEMIT(layers=(0,), merge_subjects=True, key_contexts="both", **QUICK)
    with pytest.raises(EditRefused, match="has 1, another of 'Danielle Darrieux' 2: even them out"):
        merged.edit(gpt2, [EDIT, twin])
    assert merged.edit(gpt2, [EDIT, replace(twin, rephrasings=(*twin.rephrasings, "{} is from"))]).deltas
