"""A fingerprint tells base models apart, and knows copies of one in other dtypes."""

from __future__ import annotations

import pytest
import torch

from families import tiny_model, tiny_tokenizer
from reknow import LM
from reknow.model.fingerprint import Fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("made", DTYPES)
@pytest.mark.parametrize("used", DTYPES)
def test_a_patch_fits_the_copies_in_other_dtypes(family, made, used):
    """Also where half precision flushes the smallest weights to zero."""
    model = tiny_model(family)
    for parameter in model.parameters():
        parameter.data *= 10.0 ** torch.randint(-9, 1, parameter.shape)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fingerprints = []
    for dtype in (made, used):
        copy = tiny_model(family)
        copy.load_state_dict(state)
        fingerprints.append(Fingerprint.of(copy.to(dtype), tiny_tokenizer()))
    assert fingerprints[0].difference(fingerprints[1]) is None
    assert fingerprints[1].difference(fingerprints[0]) is None


def test_the_fingerprint_survives_a_checkpoint(lm, tmp_path):
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    again = LM(tmp_path)
    assert lm.fingerprint.difference(again.fingerprint) is None
    half = LM(tmp_path, dtype="bfloat16")
    assert lm.fingerprint.difference(half.fingerprint) is None
    # Padding is a setting of a call.
    again.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert Fingerprint.of(again.model, again.tokenizer).difference(lm.fingerprint) is None
