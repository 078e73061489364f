"""Stack folders open as they were, and are replaced whole."""

from __future__ import annotations

import warnings

import pytest

from conftest import bits, same, some_patch
from reknow import LM
from reknow.errors import PatchError
from reknow.patching.stack import STACK_FILE, read_stack, save_stack


def test_a_stack_folder_opens_as_it_was(lm, tmp_path):
    base = tmp_path / "base"
    lm.model.save_pretrained(base)
    lm.tokenizer.save_pretrained(base)
    patches = [some_patch(lm, 1)]
    patches.append(some_patch(lm, 2, dense=True, made_on=(patches[0].id,)))
    for patch in patches:
        lm.apply(patch)
    folder = save_stack(tmp_path / "stack", str(base), lm.patches)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        opened = LM(folder)
    assert [p.id for p in opened.patches] == [p.id for p in patches] and opened.name == str(base)
    assert same(bits(opened), bits(lm))
    for patch in patches:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened.revert(patch.id)
            lm.revert(patch)
    assert same(bits(opened), bits(lm))


def test_a_stack_is_replaced_whole(lm, tmp_path):
    one, two = some_patch(lm, 1), some_patch(lm, 2)
    save_stack(tmp_path, "base", [one, two])
    save_stack(tmp_path, "base", [two])
    base, patches = read_stack(tmp_path)
    assert base == "base" and [p.id for p in patches] == [two.id]
    assert read_stack("some/model") == ("some/model", [])


def test_a_stack_folder_of_a_newer_format_is_refused(tmp_path):
    (tmp_path / STACK_FILE).write_text('{"format": 99, "base": "demo:gpt2", "patches": []}')
    with pytest.raises(PatchError, match="has 99: upgrade"):
        read_stack(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"base": "x"}', '{"base": "x", "patches": ["gone.patch"]}'])
def test_a_broken_stack_folder_is_refused(tmp_path, text):
    (tmp_path / STACK_FILE).write_text(text)
    with pytest.raises(PatchError, match=r"stack folder|patch file"):
        LM(tmp_path)
