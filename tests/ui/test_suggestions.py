"""Which methods are offered: three with a reason, and every other that can make such an edit."""

from __future__ import annotations

import pytest

from reknow.errors import InputError
from reknow.registry import METHODS, NEED_A_SUBJECT
from reknow.ui.suggestions import build, others, suggest


@pytest.mark.parametrize("subject", [True, False])
def test_every_method_is_offered_once_that_can_make_the_edit(subject):
    names = [one.method for one in suggest(subject)] + others(subject)
    assert sorted(names) == sorted(set(METHODS) - (set() if subject else set(NEED_A_SUBJECT)))
    assert {one.what for one in suggest(True)} == {"weights", "fine-tuning", "memory"}


def test_a_layer_goes_into_the_field_that_the_method_has():
    assert build("rome", "3").layer == 3 and list(build("memit", " 3 ").layers) == [3]
    assert list(build("memit", "3, 4").layers) == [3, 4]
    assert build("rome").layer is None and build("rome", " auto ").layer is None
    with pytest.raises(InputError, match="setting of kn 'layer'"):
        build("kn", "3")


@pytest.mark.parametrize("text", ["three", "1.5", "²", "3,4"])
def test_what_is_no_layer_is_refused(text):
    with pytest.raises(InputError, match=f"expected layer as int or none; got '{text}'"):
        build("rome", text)
