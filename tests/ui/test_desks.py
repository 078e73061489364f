"""Desks: a stack each, in a folder that keeps what is switched off too, in its place."""

from __future__ import annotations

import os
import warnings

import pytest

from conftest import make_lm
from reknow import method
from reknow.edits import Edit
from reknow.errors import InputError, PatchError
from reknow.patching.stack import read_existing, read_history, save_stack, with_patch
from reknow.ui.desks import Desks, put_on
from reknow.ui.kept import Counts, _merged, count_kept
from reknow.ui.work import Work, applied, collect_warnings


@pytest.fixture(scope="module")
def lm():
    return make_lm("gpt2")


@pytest.fixture(scope="module")
def patches(lm):
    """Three patches, each of its own subject."""
    places = [("France", "Lima"), ("Peru", "Paris"), ("Apple", "Peru")]
    edits = [Edit("The capital of {} is", subject=subject, target_new=new) for subject, new in places]
    return [method("ft-m", steps=2).edit(lm, [edit]) for edit in edits]


@pytest.fixture
def desk(tmp_path, lm, patches):
    desk = Desks(tmp_path, "demo:gpt2").open(None)
    for patch in patches:
        desk.change(lm, "apply", lambda stack, patch=patch: with_patch(stack, patch, lm.fingerprint), "because")
    return desk


def listed(desk) -> list[tuple[str, bool]]:
    return [(one.patch.id, one.on) for one in desk.kept()]


def test_a_patch_that_is_switched_off_keeps_its_place_and_who_put_it_on(desk, lm, patches):
    a, b, c = (patch.id for patch in patches)
    desk.switch(lm, a, False)
    desk.switch(lm, b, False)
    assert listed(desk) == [(a, False), (b, False), (c, True)]
    assert [patch.id for patch in read_existing(desk.folder)[1]] == [c] and lm.patches == ()
    desk.switch(lm, b, True)
    assert listed(desk) == [(a, False), (b, True), (c, True)]
    desk.switch(lm, a, True)
    assert listed(desk) == [(a, True), (b, True), (c, True)]
    assert {one.why for one in desk.kept()} == {"because"}
    assert [line.entry.action for line in read_history(desk.folder)][3:] == ["off", "off", "on", "on"]


def test_what_is_taken_out_elsewhere_is_not_listed_and_what_is_put_on_is(desk, lm, patches):
    a, b, c = patches
    desk.switch(lm, b.id, False)
    save_stack(desk.folder, "demo:gpt2", [c], action="revert")
    assert listed(desk) == [(b.id, False), (c.id, True)]
    save_stack(desk.folder, "demo:gpt2", [c, a], action="apply", why="again")
    assert listed(desk) == [(b.id, False), (c.id, True), (a.id, True)]
    assert [one.why for one in desk.kept()] == ["because", "because", "again"]


def test_a_patch_that_is_not_there_is_refused_and_nothing_changes(desk, lm, patches):
    before = read_history(desk.folder)
    with pytest.raises(PatchError, match="expected a patch of this stack; it has none of id 0000"):
        desk.switch(lm, "0000", True)
    with pytest.raises(PatchError):
        desk.change(lm, "apply", lambda stack: (*stack, patches[0]))
    assert read_history(desk.folder) == before


@pytest.mark.parametrize(
    ("order", "on", "off", "found"),
    [
        ([], ["a"], set(), ["a"]),
        (["a", "b", "c"], ["a", "c"], {"b"}, ["a", "b", "c"]),
        (["a", "b", "c"], ["c", "a"], {"b"}, ["c", "b", "a"]),
        (["a", "b"], ["b", "d"], set(), ["b", "d"]),
        (["a"], [], {"a"}, ["a"]),
    ],
)
def test_those_that_are_off_stay_where_they_stood(order, on, off, found):
    assert _merged(order, on, off) == found


def test_names_come_from_addresses_and_lead_nowhere_else(tmp_path):
    desks = Desks(tmp_path, "demo:gpt2")
    first = desks.open("some-name")
    assert desks.open("some-name") is first and desks.open(None) is not desks.open(None)
    for name in ("../../etc", "a/b", "A B", "x", "", "." * 9, "a" * 100):
        desk = desks.open(name)
        assert desk.name != name and desk.folder.resolve().is_relative_to(tmp_path.resolve())
    assert first.folder == tmp_path / "some-name" / "demo-gpt2"


def test_a_desk_has_a_stack_for_each_model(tmp_path, desk, patches):
    desks = Desks(tmp_path, "demo:gpt2")
    desks.take(desk, "demo:llama")
    assert desk.kept() == [] and desk.model == "demo:llama"
    desks.take(desk, "demo:gpt2")
    assert len(desk.kept()) == len(patches)


def test_a_name_finds_the_model_that_it_changed_last_when_the_page_begins_anew(tmp_path, desk, patches):
    folder = desk.folder.parent / "demo-llama"
    assert Desks(tmp_path, "demo:llama").open(desk.name).model == "demo:gpt2"
    save_stack(folder, "demo:llama", [], action="apply")
    os.utime(folder / "stack.json", (2e9, 2e9))
    assert Desks(tmp_path, "demo:gpt2").open(desk.name).folder == folder
    (folder / "stack.json").write_text("{")
    os.utime(folder / "stack.json", (2e9, 2e9))
    begun = Desks(tmp_path, "demo:llama").open(desk.name)
    assert begun.model == "demo:gpt2" and len(begun.kept()) == len(patches), "a broken one is passed over"
    assert Desks(tmp_path, "demo:llama").open("some-other-name").model == "demo:llama"


def test_a_stack_that_is_there_is_a_desk_and_keeps_its_model(tmp_path, desk, patches):
    desks = Desks(tmp_path / "pages", "demo:gpt2", desk.folder)
    opened = desks.open(None)
    assert opened.name == desks.first == "demo-gpt2" and len(opened.kept()) == len(patches)
    with pytest.raises(InputError, match=r"expected demo:gpt2, on which .* is; got demo:llama"):
        desks.take(opened, "demo:llama")
    with pytest.raises(InputError, match=r"expected a base model; (.*) is a stack: open it with `reknow ui \1`"):
        desks.take(desks.open("another"), str(desk.folder))


@pytest.mark.parametrize("name", ["x" * 200, "a", "日本", "-" * 5, ("long-" * 30)])
def test_a_stack_is_found_by_the_name_that_its_address_has(tmp_path, name):
    folder = save_stack(tmp_path / "stacks" / name, "demo:gpt2", [])
    desks = Desks(tmp_path / "pages", "demo:gpt2", folder)
    assert desks.open(desks.first) is desks.open(None) and desks.open(None).folder == folder


def test_a_desk_begins_with_what_its_model_has_where_that_is_a_stack(tmp_path, desk, patches):
    begun = Desks(tmp_path / "pages", str(desk.folder)).open(None)
    assert [one.patch.id for one in begun.kept()] == [patch.id for patch in patches]
    assert begun.folder != desk.folder


def test_what_is_taken_out_is_forgotten_whether_it_was_on_or_off_and_the_history_brings_both_back(desk, lm, patches):
    a, b, c = (patch.id for patch in patches)
    desk.switch(lm, b, False)
    off = listed(desk)
    desk.take_out(lm, b, "no use")
    desk.take_out(lm, c)
    assert listed(desk) == [(a, True)]
    lines = read_history(desk.folder)
    assert [line.problem for line in lines] == [None] * 6 and lines[4].entry.reverted == [b]
    desk.go_back(lm, lines[3].id)
    assert listed(desk) == off == [(a, True), (b, False), (c, True)]
    assert {one.why for one in desk.kept()} == {"because"}, "going back is not why they are there"
    desk.go_back(lm, lines[3].id)
    assert len(read_history(desk.folder)) == 7, "it is so already, and nothing is noted"
    desk.go_back(lm, lines[2].id)
    assert listed(desk) == [(a, True), (b, True), (c, True)]
    with pytest.raises(InputError, match="expected the id of a line"):
        desk.go_back(lm, "zzzz")


def test_switching_begins_with_what_the_folder_has_now(desk, lm, patches):
    a, _, c = patches
    save_stack(desk.folder, "demo:gpt2", [a, c], action="revert")  # by another process, after the page was drawn
    desk.switch(lm, a.id, False)
    assert listed(desk) == [(a.id, False), (c.id, True)]
    desk.switch(lm, a.id, False)  # as another tab asks that was drawn before
    assert len(read_history(desk.folder)) == 5


def test_a_broken_folder_is_told_and_changes_nothing(desk, lm, patches):
    desk.switch(lm, patches[1].id, False)
    (desk.folder / f"{patches[1].id}.patch").write_bytes(b"not any more")
    with pytest.raises(PatchError, match="expected a patch file"):
        desk.kept()
    assert [patch.id for patch in desk.patches()] == [patches[0].id, patches[2].id]


def test_patches_are_counted_without_their_files_being_read(desk, lm, patches):
    assert count_kept(desk.folder.with_name("none")) == Counts(0, 0)
    desk.switch(lm, patches[1].id, False)
    for file in desk.folder.glob("*.patch"):
        file.write_bytes(b"not any more")
    assert count_kept(desk.folder) == Counts(2, 1)
    (desk.folder / "stack.json").write_text("{}", encoding="utf-8")
    with pytest.raises(PatchError, match="is broken"):
        count_kept(desk.folder)


def test_a_change_warns_once_and_each_time_and_what_applies_the_stack_later_does_not(tmp_path, lm, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    desk, stack = Desks(tmp_path, "demo:gpt2").open(None), ()
    with warnings.catch_warnings():
        collect_warnings()
        for subject in ("France", "Peru"):  # the second one is made on the first
            with lm.stacked(stack):
                edit = Edit("The capital of {} is", subject=subject, target_new="Lima")
                stack = (*stack, method("ft-m", steps=2).edit(lm, [edit]))
        first, second = stack

        def told(task) -> list[str]:
            work = Work("changing", task)
            assert work.wait(60) and work.error is None
            return work.warnings

        assert told(lambda: desk.change(lm, "apply", lambda _: put_on(stack, lm))) == []
        for _ in range(2):
            assert told(lambda: desk.switch(lm, first.id, False)) == [
                f"{second.label}: made on top of {first.id}, the effect may differ"
            ]
            assert told(lambda: use(lm, desk)) == []
            assert told(lambda: desk.switch(lm, first.id, True)) == []
        assert len(told(lambda: desk.take_out(lm, first.id))) == 1


def use(lm, desk) -> None:
    with applied(lm, desk.patches()):
        assert lm.patches == desk.patches()
