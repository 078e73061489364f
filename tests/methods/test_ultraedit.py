"""UltraEdit: batches continue each other's statistics, in one call and over patches."""

from __future__ import annotations

import pytest
import torch

from reknow import Edit, UltraEdit, method

EDITS = [
    Edit(f"The capital of {name} is", target_new="Paris in France") for name in ("Peru", "Lima", "Rome", "Italy")
]
SETTINGS = dict(layers=(1,), min_tokens=2)


def test_former_names_are_read():
    with pytest.warns(FutureWarning, match="learning_rate_absolute"):
        published = method("ultraedit", learning_rate_absolute=1e-6, turn=10)
    assert published == UltraEdit(learning_rate=1e-6, units="absolute", batch_size=10)


def test_batches_of_one_call_are_what_patches_one_after_the_other_give(lm):
    whole = UltraEdit(batch_size=2, **SETTINGS).edit(lm, EDITS)
    (name,) = whole.deltas
    parts = []
    with lm.patched():
        for start in (0, 2):
            parts.append(UltraEdit(**SETTINGS).edit(lm, EDITS[start : start + 2]))
            lm.apply(parts[-1])
    apart = sum(part.deltas[name].dense() for part in parts)
    assert torch.allclose(whole.deltas[name].dense(), apart, rtol=1e-4, atol=1e-7)
    counts = [float(next(v for k, v in patch.state.items() if k.endswith(".count"))) for patch in (whole, *parts)]
    assert counts[0] == counts[1] + counts[2]


def test_units_say_what_a_rate_is_a_multiple_of(lm):
    one, two = (UltraEdit(learning_rate=rate, units="absolute", **SETTINGS).edit(lm, EDITS) for rate in (1e-3, 2e-3))
    (name,) = one.deltas
    assert torch.allclose(2 * one.deltas[name].dense(), two.deltas[name].dense(), rtol=1e-5, atol=1e-12)
    relative = UltraEdit(**SETTINGS).edit(lm, EDITS).deltas[name].dense()
    direction = one.deltas[name].dense()
    assert not torch.allclose(relative, direction, rtol=1e-2)
