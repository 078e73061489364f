"""MEMIT, EMMET, PMET and AlphaEdit: what each promises beyond the numbers of its authors' code."""

from __future__ import annotations

import pytest
import torch

from conftest import AuthorsSearch, make_lm
from reknow.editing.covariance import covariance
from reknow.editing.keys import Subjects
from reknow.editing.norm_anchor import anchor_states
from reknow.editing.solvers import null_space
from reknow.editing.values import find_values
from reknow.edits import Edit
from reknow.errors import EditFailed
from reknow.methods import method
from reknow.methods.alphaedit import AlphaEdit
from reknow.methods.emmet import EMMET
from reknow.methods.memit import MEMIT
from reknow.methods.pmet import PMET

EDITS = [
    Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English", target_true="French"),
    Edit("{} is a city in", subject="Lima", target_new="Italy", target_true="Peru"),
    Edit("The famous player {}", subject="Toko Yasuda", target_new="piano", target_true="guitar"),
]
CONTEXTS = ("", "The city. ", "I saw. ")
FAST = dict(context_groups=(), covariance_tokens=1000, steps=6)
SPREAD = ["memit", "memit-merge", "pmet", "alphaedit", "alphaedit-blue"]
METHODS = {name: dict(layers=(0, 1), **FAST) for name in SPREAD} | {"emmet": dict(layer=0, **FAST)}


@pytest.fixture(scope="module")
def gpt2():
    return make_lm("gpt2", n_layer=4)  # no band ends in the last layer, where no answer sees the subject


def nll(lm, edits):
    return torch.tensor([s.nll for s in lm.score([e.text for e in edits], [e.target_new for e in edits])])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_blocks_that_rescale_the_mlp_are_edited_at_the_value_matrix(name, family):
    lm = make_lm(family)
    assert not lm.parts.residual_identity
    patch = method(name, **METHODS[name]).edit(lm, EDITS[:2])
    before = nll(lm, EDITS[:2]).sum()
    with lm.patched(patch):
        assert nll(lm, EDITS[:2]).sum() < before


def test_memit_without_regularization_reaches_z_in_one_layer(gpt2):
    patch = MEMIT(layers=(1,), regularization=0.0, **FAST).edit(gpt2, EDITS)
    search = MEMIT(steps=6, stop_probability=1.0, min_delta=0.0, context_batches=1)
    wanted = find_values(gpt2, EDITS, 1, ("",), search).z.double()
    with gpt2.patched(patch):
        assert torch.allclose(Subjects(gpt2, EDITS, [""]).states(1, "block"), wanted, atol=1e-4)


def test_memit_distributes_the_residual_over_its_layers(gpt2):
    patch = MEMIT(layers=(0, 1, 2), **FAST).edit(gpt2, EDITS)
    assert list(patch.deltas) == list(gpt2.parts.value[:3])
    assert patch.notes["layers"] == [0, 1, 2]


@pytest.mark.parametrize("name", ["memit", "pmet"])
def test_over_a_band_the_layers_together_write_what_was_searched_and_no_more(gpt2, name):
    settings = dict(layers=(0, 1, 2), regularization=0.0, **FAST)
    made = method(name, **settings)
    wanted = find_values(gpt2, EDITS, 2, ("",), made)
    before = Subjects(gpt2, EDITS, [""]).states(2, "block")
    with gpt2.patched(made.edit(gpt2, EDITS)):
        moved = Subjects(gpt2, EDITS, [""]).states(2, "block") - before
    assert torch.allclose(moved, wanted.delta.double(), atol=1e-4)


def test_pmet_in_the_papers_units_measures_at_the_last_matrix(gpt2):
    assert PMET(units="absolute").rules.site == PMET.paper("gpt-j-6b").rules.site == "value"
    assert PMET().rules.site == "block"


def test_emmet_names_facts_with_one_key(gpt2):
    twins = [Edit(f"{{}} {tail}", subject="Lima", target_new=tail) for tail in ("is the", "lies in")]
    with pytest.raises(EditFailed, match="Lima lies in"):
        EMMET(layer=0, regularization=0.0, **FAST).edit(gpt2, twins)


def test_alphaedit_knows_the_keys_of_applied_patches_only(gpt2):
    settings = AlphaEdit(layers=(0, 1), **FAST)
    first = settings.edit(gpt2, EDITS[:2])
    assert {name: tuple(t.shape) for name, t in first.state.items()} == {
        f"keys.{name}": (2, 128) for name in gpt2.parts.value[:2]
    }
    alone = settings.edit(gpt2, EDITS[2:])
    with gpt2.patched(first):
        behind = settings.edit(gpt2, EDITS[2:])
        keys = first.state[f"keys.{gpt2.parts.value[0]}"].double()
    again = settings.edit(gpt2, EDITS[2:])
    assert again.id == alone.id != behind.id
    name = gpt2.parts.value[0]
    moved = [(patch.deltas[name].dense() @ keys.T).norm() / patch.deltas[name].norm() for patch in (alone, behind)]
    assert moved[1] < moved[0]


@pytest.mark.parametrize("name", ["memit", "pmet"])
def test_a_band_holds_the_keys_of_applied_patches_where_it_is_asked_to(gpt2, name):
    settings = dict(layers=(0, 1), covariance_weight=1.0, **FAST)
    plain, holding = (method(name, hold_earlier=on, **settings) for on in (False, True))
    first, again = (
        holding.edit(gpt2, EDITS[:1]),
        Edit("The friend of {} is", subject="Danielle Darrieux", target_new="Peru"),
    )
    matrix = gpt2.parts.value[0]
    assert not plain.edit(gpt2, EDITS[:1]).state and list(first.state) == [f"keys.{m}" for m in gpt2.parts.value[:2]]
    assert first.deltas[matrix].dense().equal(plain.edit(gpt2, EDITS[:1]).deltas[matrix].dense())
    with gpt2.patched(first):
        free, held = plain.edit(gpt2, [again]), holding.edit(gpt2, [again])
    keys = first.state[f"keys.{matrix}"].double()
    C, k = covariance(gpt2, 0, tokens=1000).double(), held.state[f"keys.{matrix}"].double()
    right = held.deltas[matrix].dense()  # of rank one: a multiple of k (C + k kᵀ + K_p K_pᵀ)⁻¹
    wanted = (k @ torch.linalg.inv(C + k.T @ k + keys.T @ keys))[0]
    share = torch.nn.functional.cosine_similarity(right, wanted[None], dim=1).abs()
    assert torch.allclose(share, torch.ones_like(share), atol=1e-6)
    moved = [(patch.deltas[matrix].dense() @ keys.T).norm() for patch in (free, held)]
    assert moved[1] < 0.8 * moved[0]


def test_alphaedit_moves_only_the_weakest_directions(gpt2):
    patch = AlphaEdit(layers=(0,), null_share=0.1, **FAST).edit(gpt2, EDITS)
    basis = null_space(covariance(gpt2, 0, tokens=1000), 0.1)
    change = patch.deltas[gpt2.parts.value[0]].dense()
    assert float((change - change @ basis @ basis.T).norm()) < 1e-5 * float(change.norm())


def test_blue_writes_the_boundary_layers(gpt2):
    patch = method("alphaedit-blue", layers=(0, 1, 2), **FAST).edit(gpt2, EDITS)
    assert list(patch.deltas) == [gpt2.parts.value[0], gpt2.parts.value[2]]


def test_norm_anchor_keeps_the_length_of_wanted_values(gpt2):
    settings = AlphaEdit(layers=(0,), norm_anchor=True, **FAST)
    found = find_values(gpt2, EDITS, 0, CONTEXTS, AuthorsSearch(steps=4, site="block"))
    z, anchor = anchor_states(found, None)
    value = z - found.start + found.value  # v* after scaling
    assert torch.allclose(value.norm(dim=1), anchor.double().expand(3), rtol=1e-5)
    first = settings.edit(gpt2, EDITS[:2])
    with gpt2.patched(first):
        second = settings.edit(gpt2, EDITS[2:])
    name = f"anchor.{gpt2.parts.value[0]}"
    assert torch.equal(first.state[name], second.state[name])
