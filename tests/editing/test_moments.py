"""Covariances that the code of ROME, MEMIT or EasyEdit kept, in place of our own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import make_lm
from reknow import ROME, Edit
from reknow.editing import covariance as module
from reknow.editing.covariance import covariance, statistics
from reknow.errors import InputError

TEXTS = ["The capital of Peru is Lima .", "Beats Music is owned by Apple ."] * 4


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("REKNOW_CACHE", str(tmp_path / "cache"))


def keep(folder, matrix: str, total, count: int, **more) -> None:
    """A file as `SecondMoment.state_dict` and `numpy.savez` write it there."""
    folder.mkdir(exist_ok=True)
    arrays = {"mom2.mom2": total, "mom2.count": count, "mom2.constructor": "util.runningstats.SecondMoment()"}
    np.savez(folder / f"{matrix}_float32_mom2_100000.npz", **arrays | {"sample_size": 100000} | more)


def test_it_is_taken_in_place_of_reading_text_and_kept(family, tmp_path, monkeypatch):
    lm = make_lm(family)
    own = statistics(lm, [1], text=TEXTS)[1]
    total = own.covariance.double().numpy() * own.tokens
    keep(tmp_path / "stats", lm.parts.value[1], total.astype(np.float32), own.tokens)
    monkeypatch.setattr(module, "sum_keys", None)  # no text is read
    found = statistics(lm, [1], text=str(tmp_path / "stats"))[1]
    assert found.tokens == own.tokens and found.file != own.file
    torch.testing.assert_close(found.covariance, own.covariance, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(module, "read_moment", None)  # kept
    assert torch.equal(covariance(lm, 1, text=str(tmp_path / "stats")), found.covariance)


def test_a_method_edits_with_it(family, tmp_path):
    lm = make_lm(family)
    edit = Edit("The capital of {} is", subject="Peru", target_new="Paris")
    width = lm.weight(lm.parts.value[1]).shape[1]
    keep(tmp_path / "stats", lm.parts.value[1], np.eye(width) * 40, 10)  # C is 4 times the identity
    small = {"layer": 1, "steps": 3, "context_groups": ((2, 3),)}
    theirs = ROME(covariance_text=str(tmp_path / "stats"), **small).edit(lm, [edit])
    plain = ROME(covariance_tokens=0, **small).edit(lm, [edit])
    name = lm.parts.value[1]
    torch.testing.assert_close(theirs.deltas[name].dense(), plain.deltas[name].dense(), rtol=1e-3, atol=1e-5)


def test_files_that_are_none_are_refused_in_a_sentence(tmp_path):
    lm = make_lm("gpt2")
    matrix, width = lm.parts.value[1], lm.weight(lm.parts.value[1]).shape[1]
    good = np.eye(width)
    broken = {
        "other matrix": ((lm.parts.value[0], good, 10), "expected one file of"),
        "other size": ((matrix, np.eye(width // 2), 10), f"not of {width}"),
        "too large": ((matrix, np.eye(2 * width), 10), "is larger than"),
        "no tokens": ((matrix, good, 0), "no mean of k kᵀ over 0 tokens"),
        "not symmetric": ((matrix, np.triu(np.ones((width, width))), 10), "no mean of"),
        "not finite": ((matrix, good * np.nan, 10), "no mean of"),
        "pickled": ((matrix, np.array([[{}] * width] * width, dtype=object), 10), "allow_pickle=False"),
        "whole numbers": ((matrix, good.astype(int), 10), "numbers of int64"),
    }
    for name, (arguments, said) in broken.items():
        keep(tmp_path / name, *arguments)
        with pytest.raises(InputError) as refused:
            covariance(lm, 1, text=str(tmp_path / name))
        assert said in str(refused.value) and "\n" not in str(refused.value), name
    (file,) = (tmp_path / "no tokens").iterdir()
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match="it is none of this matrix"):
        covariance(lm, 1, text=str(tmp_path / "no tokens"))
