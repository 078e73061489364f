"""What the edits of memories beside a matrix go through: they have one place, and what holds for all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conftest import make_lm
from reknow import DEFER, GRACE, IKE, MELO, MEMOIR, WISE, Edit, Patch
from reknow.errors import InputError, PatchError

WISE_QUICK = WISE(layer=1, steps=2, context_groups=((1, 3),), unrelated_facts=2)
MEMOIR_QUICK = MEMOIR(layer=1, steps=2, context_groups=((1, 3),))
PLACES = {"grace": "layer or site", "melo": "layer or span"}
"""The fields that say where a memory stands, of methods that have more than a layer."""
SIDE = [GRACE(layer=1, steps=2), DEFER(layer=1, steps=2), MELO(layer=1, span=1, steps=2), WISE_QUICK, MEMOIR_QUICK]


def edit(prompt: str, target: str = "of") -> Edit:
    return Edit(prompt, target_new=target)


@pytest.mark.parametrize("method", SIDE, ids=lambda method: method.name)
def test_one_memory_has_one_place(method, tmp_path):
    lm = make_lm()
    lm.apply(Patch.load(method.edit(lm, [edit("I know")]).save(tmp_path / "one.patch")))
    fields = PLACES.get(method.name, "layer")
    with pytest.raises(InputError, match=rf"where the memory is; got .*: change {fields}$"):
        type(method)(**vars(method) | {"layer": 2}).edit(lm, [edit("The capital of Peru is")])


OTHERS: list[tuple[Any, dict[str, Any]]] = [
    *((method, {"units": "absolute"}) for method in SIDE),
    (SIDE[0], {"replacement": "last"}),
    (SIDE[1], {"threshold": 0.9}),
    (SIDE[2], {"rank": 3}),
    (WISE_QUICK, {"shard_size": 3}),
    (MEMOIR_QUICK, {"top_k": 5}),
    (MEMOIR_QUICK, {"seed": 5}),
    (IKE(demonstrations=0), {"encoder": "another"}),
]


@pytest.mark.parametrize(
    ("method", "other"), OTHERS, ids=lambda part: getattr(part, "name", None) or next(iter(part))
)
def test_what_holds_for_all_edits_of_a_memory_is_as_it_was_begun(method, other, tmp_path):
    """Else the edits before would be lost, or the version could not be put on."""
    lm = make_lm()
    ((name, value),) = other.items()
    lm.apply(Patch.load(method.edit(lm, [edit("I know")]).save(tmp_path / "one.patch")))
    with pytest.raises(
        InputError, match=f"expected the {name} that .* begun with; got {value}: set it to .*, or take"
    ):
        replace(method, **other).edit(lm, [edit("Beats Music is")])
    lm.apply(method.edit(lm, [edit("Beats Music is")]))
    if name == "encoder":  # which is not there
        begun = lm.patches[0]
        lm.restack([replace(begun, settings={**begun.settings, **other})])
        with pytest.raises(InputError, match="got None: set it to another, or take"):
            method.edit(lm, [edit("Beats Music is")])
        return
    with lm.unpatched():
        replace(method, **other).edit(lm, [edit("Beats Music is")])


@pytest.mark.parametrize("method", SIDE[:4], ids=lambda method: method.name)
def test_units_of_a_memory_from_before_they_had_this_name(method):
    lm = make_lm()
    patch = replace(method, units="absolute").edit(lm, [edit("I know")])
    others = {name: value for name, value in patch.settings.items() if name != "units"}
    lm.apply(replace(patch, settings={**others, "absolute": True}))
    with pytest.warns(FutureWarning, match="absolute of"):
        with pytest.raises(InputError, match="got relative: set it to absolute"):
            method.edit(lm, [edit("Beats Music is")])
        replace(method, units="absolute").edit(lm, [edit("Beats Music is")])
    lm.restack([replace(patch, settings=others)])  # before there were any
    with pytest.raises(InputError, match="got absolute: set it to relative"):
        replace(method, units="absolute").edit(lm, [edit("Beats Music is")])


def other_seed(patch: Patch) -> Patch:
    return replace(patch, memory={**patch.memory, "seed": 7})


def other_background(patch: Patch) -> Patch:
    return replace(patch, state={**patch.state, "background": patch.state["background"] + 1})


def other_place(patch: Patch) -> Patch:
    return replace(patch, memory={**patch.memory, "modules": patch.memory["modules"][::-1]})


def other_shards(patch: Patch) -> Patch:
    return replace(patch, memory={**patch.memory, "shard_size": 3})


@pytest.mark.parametrize(
    ("method", "change", "name"),
    [
        (MEMOIR_QUICK, other_seed, "seed"),
        (MEMOIR_QUICK, other_background, "background"),
        (WISE_QUICK, other_shards, "shard_size"),
        (replace(SIDE[2], span=2), other_place, "modules"),
    ],
)
def test_versions_that_are_not_of_one_memory_are_not_put_on(method, change, name):
    """Whoever wrote them: the newest one's would be read into what the others have."""
    lm = make_lm()
    lm.apply(method.edit(lm, [edit("I know")]))
    before, later = lm.patches, method.edit(lm, [edit("Beats Music is")])
    with pytest.raises(
        PatchError, match=rf"versions of one memory with the same {name}; got another in patch \w+ \("
    ):
        lm.apply(change(later))
    assert lm.patches == before
    lm.apply(later)
