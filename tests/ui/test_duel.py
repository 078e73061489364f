"""Two methods on one fact, in a browser."""

from __future__ import annotations

import pytest

from drive_page import open_screen, wait_until_idle, write

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def open_duel(tab) -> None:
    """Opens the part of its screen."""
    open_screen(tab, "Compare")
    open_screen(tab, "Two methods on one fact")


def choose(tab, box: str, method: str) -> None:
    """Chooses a method in a list."""
    tab.click(f"#duel-{box} input")
    tab.get_by_role("option", name=method, exact=True).click()
    tab.get_by_role("option").first.wait_for(state="detached")


def test_two_methods_are_tried_on_what_stands_in_edit_and_stay_after_a_reload(open_tab):
    tab = open_tab()
    write(tab, prompt="The mother tongue of Danielle Darrieux is", subject="Danielle Darrieux", target="English")
    open_duel(tab)
    tab.click("#duel-take")
    tab.wait_for_function("document.querySelector('#duel-target :is(input, textarea)').value === 'English'")
    choose(tab, "first", "grace")
    tab.click("#duel-go")
    tab.locator("#duel .side >> nth=2").wait_for()
    wait_until_idle(tab)
    tab.reload()
    open_duel(tab)
    tab.locator("#duel .side >> nth=2").wait_for()
    assert tab.locator("#duel .side h3").all_inner_texts() == ["before", "after grace", "after ft-m"]
    assert tab.locator("#duel .lead").count() == 2 and "no patch yet" in tab.inner_text("#stack-line")
    assert tab.input_value("#duel-first input") == "grace"
    choose(tab, "first", "ft-m")
    tab.click("#duel-go")
    tab.get_by_text("expected two methods; got ft-m and ft-m").wait_for()
    wait_until_idle(tab)
    assert tab.inner_text("#duel") == "No result yet.", "what was made before is no result of what is asked for now"


def test_the_first_result_is_there_while_the_second_is_made_and_stays_when_that_is_cancelled(open_tab):
    tab = open_tab()
    open_duel(tab)
    texts = ["The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English"]
    write(tab, **{f"duel-{name}": text for name, text in zip(("prompt", "subject", "target"), texts, strict=True)})
    choose(tab, "first", "ft-m")
    choose(tab, "second", "kn")
    tab.click("#duel-go")
    tab.locator("#duel .sides").wait_for()
    tab.click("#cancel")
    tab.get_by_text("Cancelled: what was tried until then is shown").wait_for()
    wait_until_idle(tab)
    assert tab.locator("#duel .side h3").all_inner_texts() == ["before", "after"]
    assert "now says English" in tab.inner_text("#duel .lead")
