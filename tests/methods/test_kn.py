"""KN: what it promises beyond the numbers of its authors' code."""

from __future__ import annotations

import pytest

from conftest import make_lm
from reknow.edits import Edit
from reknow.errors import EditFailed
from reknow.methods.kn import KN, attribute_neurons
from reknow.model.hooks import added_at, output_edited
from reknow.model.tokens import EncodedText, Text

EDIT = Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English", target_true="French")


@pytest.fixture(scope="module")
def gpt2():
    return make_lm("gpt2")


def test_kn_erases_the_slots(gpt2):
    patch = KN(erase=True).edit(gpt2, [EDIT])
    with gpt2.patched(patch):
        for layer, slot in patch.notes["neurons"]:
            assert not gpt2.weight(gpt2.parts.value[layer])[:, slot].any()


def test_kn_attributions_add_up(gpt2):
    """Σᵢ Attrᵢ ≈ P(neurons of a layer as they are) − P(all of them 0): the completeness of integrated gradients."""
    scores = attribute_neurons(gpt2, "The capital of Peru", "is", 200)
    (row,) = gpt2.encode([Text("The capital of Peru", "is")])
    assert len(row.target_ids) == 1
    batch = gpt2.pad([EncodedText(row.ids[:-1], len(row.ids) - 1)])
    column, target = row.prompt_length - 1, row.ids[-1]

    def probability():
        return gpt2.forward(batch.ids, batch.mask, batch.positions, None).logits[0, -1].softmax(-1)[target]

    for layer, name in enumerate(gpt2.parts.value):
        key = gpt2.read([row], [column], inputs=[name]).inputs[name]
        with output_edited(gpt2.model.get_submodule(name), added_at(-key @ gpt2.weight(name).T, column)):
            without = probability()
        assert float(scores[layer].sum()) == pytest.approx(float(probability() - without), abs=2e-4)


def test_kn_says_when_paraphrases_share_no_neuron(gpt2):
    edit = Edit("{} is", subject="Lima", target_new="a", target_true="b", rephrasings=("Where {} lies",))
    with pytest.raises(EditFailed, match="2 prompts"):
        KN(prompt_share=1.0).edit(gpt2, [edit])
