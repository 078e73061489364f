"""MEMIT, EMMET, PMET, AlphaEdit and KN: what each promises beyond the numbers of its authors' code."""

from __future__ import annotations

import pytest
import torch

from conftest import make_lm
from families import CORE_FAMILIES
from reknow import LM, load_cases
from reknow.editing import search, values
from reknow.editing import value_batch as batches_of_facts
from reknow.editing.covariance import covariance
from reknow.editing.keys import Subjects
from reknow.editing.values import ValueSearch, find_values
from reknow.edits import Edit
from reknow.errors import EditFailed, InputError
from reknow.methods import method
from reknow.methods.alphaedit import AlphaEdit
from reknow.methods.emmet import EMMET
from reknow.methods.kn import KN
from reknow.methods.memit import MEMIT
from reknow.model.tokens import Row, Text
from reknow.patching.patches import Patch

EDITS = [
    Edit("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English", target_true="French"),
    Edit("{} is a city in", subject="Lima", target_new="Italy", target_true="Peru"),
    Edit("The famous player {}", subject="Toko Yasuda", target_new="piano", target_true="guitar"),
]
CONTEXTS = ("", "The city. ", "I saw. ")
FAST = dict(context_groups=(), covariance_tokens=1000, steps=6)
SPREAD = ["memit", "memit-merge", "pmet", "alphaedit", "alphaedit-blue"]
METHODS = {name: dict(layers=(0, 1), **FAST) for name in SPREAD} | {
    "emmet": dict(layer=0, **FAST),
    "kn": {},
    "kn-erase": {},
}


@pytest.fixture(scope="module")
def gpt2():
    return make_lm("gpt2")


def weights(lm):
    return {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}


def nll(lm, edits):
    return torch.tensor([s.nll for s in lm.score([e.text for e in edits], [e.target_new for e in edits])])


# --- the search for δ ------------------------------------------------------------------------------------


def test_facts_in_one_batch_are_searched_as_if_alone(gpt2):
    search = ValueSearch(steps=8, site="block")
    together = find_values(gpt2, EDITS, 1, CONTEXTS, search)
    for i, edit in enumerate(EDITS):
        alone = find_values(gpt2, [edit], 1, CONTEXTS, search)
        assert torch.allclose(together.z[i], alone.z[0], atol=1e-4)
        assert together.losses[i] == pytest.approx(alone.losses[0], rel=1e-4)


def test_more_facts_than_fit_are_searched_in_turns(gpt2, monkeypatch):
    search = ValueSearch(steps=6, site="block")
    whole = find_values(gpt2, EDITS, 0, CONTEXTS, search)
    monkeypatch.setattr(batches_of_facts, "TOKENS_PER_BATCH", 1)
    parts = find_values(gpt2, EDITS, 0, CONTEXTS, search)
    assert torch.allclose(whole.z, parts.z, atol=1e-4)
    assert torch.allclose(whole.mean_key, parts.mean_key, atol=1e-5)


def test_finished_facts_leave_and_stay_as_they_are(gpt2, monkeypatch):
    plain = find_values(gpt2, EDITS, 1, CONTEXTS, ValueSearch(steps=12))
    stop = sorted(losses[5] for losses in plain.losses)[1] + 1e-3  # two of three are below by then
    runs, keep = [], batches_of_facts.Run.keep
    monkeypatch.setattr(batches_of_facts.Run, "keep", lambda run, which: runs.append(len(which)) or keep(run, which))
    search = ValueSearch(steps=12, stop_loss=stop)
    early = find_values(gpt2, EDITS, 1, CONTEXTS, search)
    assert runs and runs[-1] == 1
    for i, edit in enumerate(EDITS):
        alone = find_values(gpt2, [edit], 1, CONTEXTS, search)
        assert len(early.losses[i]) == len(alone.losses[0])
        assert torch.allclose(early.delta[i], alone.delta[0], atol=1e-4)


def test_contexts_read_in_turns_give_the_same_means_and_end_when_all_are_satisfied(gpt2):
    whole = find_values(gpt2, EDITS, 1, CONTEXTS, ValueSearch(steps=12))
    dealt = find_values(gpt2, EDITS, 1, CONTEXTS, ValueSearch(steps=12, context_batches=2))
    assert torch.allclose(dealt.mean_key, whole.mean_key, atol=1e-5)
    assert torch.allclose(dealt.key, whole.key, atol=1e-5)
    assert all(losses[-1] < losses[1] for losses in dealt.losses)  # both of the second hand
    loose = max(loss for losses in dealt.losses for loss in losses) + 1
    ended = find_values(gpt2, EDITS, 1, CONTEXTS, ValueSearch(steps=12, context_batches=2, stop_loss=loose))
    assert [len(losses) for losses in ended.losses] == [2, 2, 2]  # a pass for each hand


def test_a_search_that_gains_little_ends_once_the_answer_is_the_likeliest():
    lm = LM.demo("gpt2")
    edits = [case.edit for case in load_cases("counterfact", limit=12)]
    plain = dict(
        steps=40,
        context_batches=2,
        learning_rate=0.1,
        units="relative",
        stop_probability=1.0,
        stop_loss=0.0,
        clamp=1.0,
    )

    def lengths(**stop):
        found = find_values(lm, edits, 0, CONTEXTS, ValueSearch(**plain, **stop, site="block"))
        return [len(losses) for losses in found.losses]

    hit = lengths(stop_drift=torch.inf)  # ended as soon as every context in turn has the answer
    assert min(hit) < 9 < max(hit)
    first = [max(passes, 9) for passes in hit]  # 8 passes show what one gains, both hands must have the answer then
    soon, later = lengths(min_delta=torch.inf), lengths(min_delta=0.02)
    assert all(a <= b <= c for a, b, c in zip(first, soon, later, strict=True))
    assert sum(a == b for a, b in zip(first, soon, strict=True)) > 9
    assert any(9 < passes < 40 for passes in later)


def test_what_a_pass_gains_is_read_off_whole_rounds_of_the_hands():
    falling = [10.0 - 0.5 * i + (3.0 if i % 3 == 0 else 0.0) for i in range(12)]  # one hand of three is harder
    assert values._gain(falling, 3) == pytest.approx(0.5)
    assert values._gain(falling[:11], 3) == torch.inf
    assert values._gain([1.0] * 8, 1) == 0


def test_a_context_that_comes_twice_counts_twice(gpt2):
    twice = find_values(gpt2, EDITS, 1, (*CONTEXTS, CONTEXTS[1]), ValueSearch(steps=1))
    once = [find_values(gpt2, EDITS, 1, (context,), ValueSearch(steps=1)).key for context in CONTEXTS]
    assert torch.allclose(twice.mean_key, (once[0] + 2 * once[1] + once[2]) / 4, atol=1e-5)


def test_merged_subjects_share_one_addition(gpt2):
    edits = [EDITS[0], EDITS[1], Edit("{} lives in", subject="Danielle Darrieux", target_new="Rome")]
    found = find_values(gpt2, edits, 1, CONTEXTS, ValueSearch(steps=6, merge_subjects=True))
    assert torch.equal(found.delta[0], found.delta[2])
    assert not torch.equal(found.delta[0], found.delta[1])
    apart = find_values(gpt2, edits, 1, CONTEXTS, ValueSearch(steps=6))
    assert not torch.equal(apart.delta[0], apart.delta[2])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "granite"])
def test_an_addition_at_attention_is_what_a_full_pass_computes(family):
    from reknow.model.hooks import added_at, output_edited
    from reknow.model.replay import BlockReplay

    lm = make_lm(family)
    (row,) = lm.encode([Text.of("The capital of {} is", "Peru", "Lima")])
    batch, column = lm.pad([row]), row.subject_last
    value, attention = torch.randn(2, 1, lm.parts.hidden_size)
    here = torch.arange(column, len(row.ids))
    ours = BlockReplay(lm, batch, 1, column)(value, torch.zeros_like(here), here, attention=attention)
    with (
        output_edited(lm.model.get_submodule(lm.parts.value[1]), added_at(value, column)),
        output_edited(lm.model.get_submodule(lm.parts.attention_out[1]), added_at(attention, column)),
    ):
        whole = lm.forward(batch.ids, batch.mask, batch.positions, None).logits[0, column:]
    assert torch.allclose(ours, whole, atol=1e-4)


# --- all methods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CORE_FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_editing_leaves_the_model_alone_and_its_patch_works(name, family, tmp_path):
    lm = make_lm(family)
    before, score = weights(lm), nll(lm, EDITS[:2])
    patch = method(name, **METHODS[name]).edit(lm, EDITS[:2])
    assert all(torch.equal(before[n], p) for n, p in lm.model.named_parameters())
    assert patch.method == name
    lm.apply(patch)
    if name != "kn-erase":
        assert (nll(lm, EDITS[:2]) < score + 0.5).all() and nll(lm, EDITS[:2]).sum() < score.sum()
    edited = weights(lm)
    assert sum(not torch.equal(before[n], p) for n, p in edited.items()) == len(patch.deltas)
    lm.revert(patch)
    assert all(torch.equal(before[n], p) for n, p in lm.model.named_parameters())
    loaded = Patch.load(patch.save(tmp_path / "a.patch"))
    assert loaded.id == patch.id
    with lm.patched(loaded):
        assert all(torch.equal(edited[n], p) for n, p in lm.model.named_parameters())


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("kn")])
@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_blocks_that_rescale_the_mlp_are_edited_at_the_value_matrix(name, family):
    lm = make_lm(family)
    assert not lm.parts.residual_identity
    patch = method(name, **METHODS[name]).edit(lm, EDITS[:2])
    before = nll(lm, EDITS[:2]).sum()
    with lm.patched(patch):
        assert nll(lm, EDITS[:2]).sum() < before


@pytest.mark.parametrize("name", SPREAD)
def test_wrong_layers_are_refused(gpt2, name):
    for layers in ((0, 9), ()):
        with pytest.raises(InputError, match="layer"):
            method(name, layers=layers, **FAST).edit(gpt2, EDITS)


# --- each method -----------------------------------------------------------------------------------------


def test_memit_without_stiffness_reaches_z_in_one_layer(gpt2):
    patch = MEMIT(layers=(1,), regularization=0.0, **FAST).edit(gpt2, EDITS)
    settings = dict(learning_rate=MEMIT.learning_rate, weight_decay=MEMIT.weight_decay, units=MEMIT.units)
    search = ValueSearch(steps=6, clamp=MEMIT.clamp, site="block", **settings)
    wanted = find_values(gpt2, EDITS, 1, ("",), search).z.double()
    with gpt2.patched(patch):
        assert torch.allclose(Subjects(gpt2, EDITS, [""]).states(1, "block"), wanted, atol=1e-4)


def test_memit_spreads_what_is_missing_over_its_layers(gpt2):
    patch = MEMIT(layers=(0, 1, 2), **FAST).edit(gpt2, EDITS)
    assert list(patch.deltas) == list(gpt2.parts.value)
    assert patch.notes["layers"] == [0, 1, 2]


def test_keys_are_half_bare_prompt_and_half_prefixed(gpt2):
    bare, one, two = (Subjects(gpt2, EDITS, [context]).keys(1) for context in CONTEXTS)
    assert torch.allclose(Subjects(gpt2, EDITS, CONTEXTS).keys(1), bare / 2 + one / 4 + two / 4, atol=1e-6)


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


def test_alphaedit_moves_only_the_weakest_directions(gpt2):
    from reknow.editing.covariance import covariance
    from reknow.editing.solvers import null_space

    patch = AlphaEdit(layers=(0,), null_share=0.1, **FAST).edit(gpt2, EDITS)
    basis = null_space(covariance(gpt2, 0, tokens=1000), 0.1)
    change = patch.deltas[gpt2.parts.value[0]].dense()
    assert float((change - change @ basis @ basis.T).norm()) < 1e-5 * float(change.norm())


def test_blue_writes_the_boundary_layers(gpt2):
    patch = method("alphaedit-blue", layers=(0, 1, 2), **FAST).edit(gpt2, EDITS)
    assert list(patch.deltas) == [gpt2.parts.value[0], gpt2.parts.value[2]]


def test_norm_anchor_keeps_the_length_of_wanted_values(gpt2):
    settings = AlphaEdit(layers=(0,), norm_anchor=True, **FAST)
    found = find_values(gpt2, EDITS, 0, CONTEXTS, ValueSearch(steps=4, site="block"))
    state: dict = {}
    z = settings._anchored(gpt2, found, 0, state)
    value = z - found.start + found.value  # v* after scaling
    anchor = state[f"anchor.{gpt2.parts.value[0]}"]
    assert torch.allclose(value.norm(dim=1), anchor.double().expand(3), rtol=1e-5)
    first = settings.edit(gpt2, EDITS[:2])
    with gpt2.patched(first):
        second = settings.edit(gpt2, EDITS[2:])
    name = f"anchor.{gpt2.parts.value[0]}"
    assert torch.equal(first.state[name], second.state[name])


def test_kn_erases_the_slots(gpt2):
    patch = KN(erase=True).edit(gpt2, EDITS[:1])
    with gpt2.patched(patch):
        for layer, slot in patch.notes["neurons"]:
            assert not gpt2.weight(gpt2.parts.value[layer])[:, slot].any()


def test_kn_attributions_add_up(gpt2):
    """Σᵢ Attrᵢ ≈ P(neurons of a layer as they are) − P(all of them 0): the completeness of integrated gradients."""
    from reknow.methods.kn import attributions
    from reknow.model.hooks import added_at, output_edited

    scores = attributions(gpt2, "The capital of Peru", "is", 200)
    (row,) = gpt2.encode([Text("The capital of Peru", "is")])
    assert len(row.target_ids) == 1
    batch = gpt2.pad([Row(row.ids[:-1], len(row.ids) - 1)])
    column, target = row.prompt_length - 1, row.ids[-1]

    def probability():
        return gpt2.forward(batch.ids, batch.mask, batch.positions, None).logits[0, -1].softmax(-1)[target]

    for layer, name in enumerate(gpt2.parts.value):
        key = gpt2.read([row], [column], inputs=[name])[name]
        with output_edited(gpt2.model.get_submodule(name), added_at(-key @ gpt2.weight(name).T, column)):
            without = probability()
        assert float(scores[layer].sum()) == pytest.approx(float(probability() - without), abs=2e-4)


def test_kn_says_when_wordings_share_no_neuron(gpt2):
    edit = Edit("{} is", subject="Lima", target_new="a", target_true="b", rephrasings=("Where {} lies",))
    with pytest.raises(EditFailed, match="2 wordings"):
        KN(prompt_share=1.0).edit(gpt2, [edit])


def test_what_is_made_of_a_covariance_is_kept_for_the_next_edit(monkeypatch):
    """Once per model, layer, text and setting; and only while it is small."""
    lm, memit = make_lm("gpt2"), MEMIT(covariance_tokens=500)
    made: list[int] = []

    def halved(matrix, part=2):
        made.append(1)
        return matrix / part

    first = memit.from_covariance(lm, 0, halved)
    assert memit.from_covariance(lm, 0, halved) is first and len(made) == 1
    assert torch.equal(memit.from_covariance(lm, 0, halved, 4), covariance(lm, 0, tokens=500) / 4)
    assert not torch.equal(memit.from_covariance(lm, 1, halved), first)
    assert not torch.equal(MEMIT(covariance_tokens=300).from_covariance(lm, 0, halved), first)
    assert len(made) == 4
    monkeypatch.setattr(search, "KEPT_BYTES", 2 * first.nbytes)
    memit.from_covariance(lm, 2, halved)  # the oldest make room
    assert torch.equal(memit.from_covariance(lm, 0, halved), first) and len(made) == 6
    assert sum(key[0] == "covariance" for key in lm.memo) == 2


def test_facts_of_unlike_width_do_not_share_a_batch(gpt2):
    """Each fact is in one batch, and one is as wide as its facts unless it is too small to matter."""
    prompts = ["{} is", "{} is a city in", "{} is a city in", "The famous player {}", "{} is a city in the land of"]
    edits = [Edit(prompt, subject="Lima", target_new="Italy") for prompt in prompts * 9]
    facts = batches_of_facts.encode_facts(gpt2, edits, CONTEXTS, "subject")
    parts = batches_of_facts.parts_of(facts, list(range(len(edits))), *batches_of_facts.room(gpt2))
    assert sorted(i for part in parts for i in part) == list(range(len(edits)))
    widths = [max(batches_of_facts._replayed(row) for row in fact) for fact in facts]
    for part in parts:
        narrow = [i for i in part if widths[i] < max(widths[i] for i in part)]
        assert len(narrow) * len(facts[0]) * max([widths[i] for i in narrow], default=0) < 2 * batches_of_facts.SMALL
    assert len(parts) > 1


def test_a_gpus_batches_of_unlike_width_find_the_same(gpt2, monkeypatch):
    """Of as many tokens as a large GPU takes, where a step of few costs nothing; the numbers are those of a CPU."""
    prompts = ["{} is", "{} is a city in", "The famous player {}", "{} is a city in the land of"]
    edits = [Edit(prompt, subject="Lima", target_new="Italy") for prompt in prompts * 6]
    large = batches_of_facts.LARGE, batches_of_facts.SMALL_ON_GPU
    facts = batches_of_facts.encode_facts(gpt2, edits, CONTEXTS, "subject")
    assert len(batches_of_facts.parts_of(facts, list(range(len(edits))), *large)) == 1
    search = ValueSearch(steps=6, site="block")
    apart = find_values(gpt2, edits, 1, CONTEXTS, search)
    monkeypatch.setattr(values, "room", lambda lm: large)
    together = find_values(gpt2, edits, 1, CONTEXTS, search)
    assert torch.allclose(together.z, apart.z, atol=1e-4)
    for one, other in zip(together.losses, apart.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
