"""The screen on which both models are asked, in a browser: answers come while they are written and are compared."""

from __future__ import annotations

from typing import Any

import pytest

from drive_page import keep, open_screen, try_edit, wait_until_idle, write

pytestmark = [pytest.mark.browser, pytest.mark.slow]
REQUEST = "The mother tongue of Danielle Darrieux is"


def ask(tab: Any, question: str, turns: int = 1) -> None:
    """Asks, and waits for the whole answers."""
    write(tab, question=question)
    tab.press("#question textarea", "Enter")
    tab.locator(f"#asked .turn >> nth={turns - 1}").wait_for()
    wait_until_idle(tab)


def settings(tab: Any, **values: str) -> None:
    """Opens the settings and writes into them."""
    tab.click("#writing button")
    tab.locator("#tokens input").wait_for()
    write(tab, **values)


def test_one_answer_without_a_patch_and_two_with_one_their_differing_words_marked(open_tab):
    tab = open_tab()
    open_screen(tab, "Ask")
    ask(tab, REQUEST)
    assert tab.locator("#asked .side").count() == 1 and "French" in tab.inner_text("#asked .said")
    assert "both are the same model" in tab.inner_text("#asked .hint")
    assert "continues your text, each question by itself" in tab.inner_text("#asked")
    assert tab.input_value("#question textarea") == ""
    open_screen(tab, "Edit")
    try_edit(tab)
    keep(tab)
    open_screen(tab, "Ask")
    ask(tab, REQUEST, turns=2)
    second = tab.locator("#asked .turn >> nth=1")
    assert [mark.strip(".,") for mark in second.locator("mark").all_inner_texts()] == ["French", "English"]
    assert second.locator(".side h3").all_inner_texts() == ["without patches", "with the patch"]
    tab.reload()
    open_screen(tab, "Ask")
    tab.locator("#asked .turn >> nth=1").wait_for()
    ask(tab, "The capital of Peru is", turns=3)
    assert "Word for word the same." in tab.inner_text("#asked .turn >> nth=2")
    tab.click("#new")
    tab.get_by_text("Nothing asked yet").wait_for()
    wait_until_idle(tab)
    assert "1 patch on" in tab.inner_text("#stack-line")


def test_an_answer_comes_while_it_is_written_and_what_came_stays_when_it_is_stopped(open_tab):
    tab = open_tab()
    try_edit(tab)
    keep(tab)
    open_screen(tab, "Ask")
    settings(tab, tokens="480")
    write(tab, question=REQUEST)
    tab.click("#ask")
    tab.wait_for_function("document.querySelector('#answering .said')?.textContent.length > 20")
    assert tab.locator("#asked .turn").count() == 0
    tab.click("#cancel")
    tab.get_by_text("Stopped: what was written so far stays.").wait_for()
    wait_until_idle(tab)
    other = open_tab(tab.url)
    open_screen(other, "Ask")
    settings(other)
    for each in (tab, other):
        assert "French" in each.inner_text("#asked .said")
        assert "stopped" in each.inner_text("#asked .side >> nth=1") and not each.is_visible("#answering .turn")
        assert each.input_value("#tokens input") == "480"


def test_what_cannot_be_asked_goes_back_to_who_wrote_it(open_tab):
    tab = open_tab()
    open_screen(tab, "Ask")
    text = "word " * 1000
    write(tab, question=text)
    tab.click("#ask")
    tab.get_by_text("expected texts of at most 512 tokens").wait_for()
    wait_until_idle(tab)
    assert tab.input_value("#question textarea") == text and tab.locator("#asked .turn").count() == 0
    settings(tab, temperature="-1")
    write(tab, question="<b>{{ x }}</b><script>document.title = 'it ran'</script>")
    tab.click("#ask")
    tab.get_by_text("expected temperature of at least 0").wait_for()
    wait_until_idle(tab)
    write(tab, temperature="0.9")
    ask(tab, tab.input_value("#question textarea"))
    assert "<b>{{ x }}</b>" in tab.inner_text("#asked .question") and tab.title() == "reknow"
    assert "temperature 0.9" in tab.inner_text("#asked")


@pytest.mark.real
def test_a_chat_model_talks_and_knows_what_was_said(open_tab):
    tab = open_tab()
    tab.fill("#model input", "demo:smollm2")
    tab.press("#model input", "Enter")
    tab.get_by_text("on demo:smollm2").wait_for()
    wait_until_idle(tab)
    open_screen(tab, "Ask")
    settings(tab, tokens="40")
    ask(tab, "My name is Zebedee. What is the capital of France?")
    assert "talks in its chat template" in tab.inner_text("#asked") and "Paris" in tab.inner_text("#asked .said")
    ask(tab, "What is my name?", turns=2)
    assert "Zebedee" in tab.inner_text("#asked .turn >> nth=1 >> .said")
