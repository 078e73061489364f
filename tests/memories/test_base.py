"""What the edits of all memories go through: one place, and conflicts with what is stored."""

from __future__ import annotations

import pytest

from conftest import make_lm
from reknow import DEFER, GRACE, IKE, MELO, WISE, CaliNet, Edit, Patch
from reknow.errors import InputError

WISE_QUICK = WISE(layer=1, steps=2, context_groups=((1, 3),), unrelated_facts=2)
SIDE = [GRACE(layer=1, steps=2), DEFER(layer=1, steps=2), MELO(layer=1, span=1, steps=2), WISE_QUICK]
ALL = [*SIDE, CaliNet(layer=1, steps=2), IKE(demonstrations=0)]


def edit(prompt: str, target: str = "of") -> Edit:
    return Edit(prompt, target_new=target)


@pytest.mark.parametrize("method", SIDE, ids=lambda method: method.name)
def test_one_memory_has_one_place(method, tmp_path):
    lm = make_lm()
    lm.apply(Patch.load(method.edit(lm, [edit("I know")]).save(tmp_path / "one.patch")))
    with pytest.raises(InputError, match="where the memory is"):
        type(method)(**vars(method) | {"layer": 2}).edit(lm, [edit("The capital of Peru is")])


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_an_edit_that_contradicts_the_memory_replaces_what_is_stored_or_is_refused(method):
    lm = make_lm()
    lm.apply(method.edit(lm, [edit("I know"), edit("Who is Zoë Übel")]))
    refusing = type(method)(**vars(method) | {"conflict": "refuse"})
    with pytest.raises(InputError, match="'I know' is stored as 'of', got 'in': rebuild without the old edit"):
        refusing.edit(lm, [edit("I know", "in")])
    assert refusing.edit(lm, [edit("I know")]).notes["conflicts"] == []
    update = method.edit(lm, [edit("I know", "in"), edit("Beats Music is")])
    assert update.notes["conflicts"] == [{"prompt": "I know", "old": "of", "new": "in"}]
    with pytest.raises(InputError, match="expected conflict as one of update, refuse"):
        type(method)(**vars(method) | {"conflict": "ask"})
