"""What the edits of memories beside a matrix go through: they have one place."""

from __future__ import annotations

import pytest

from conftest import make_lm
from reknow import DEFER, GRACE, MELO, MEMOIR, WISE, Edit, Patch
from reknow.errors import InputError

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
