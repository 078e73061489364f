"""The fourth screen, in a browser: a trace is made, its cells are asked, and an edit begins where one was chosen."""

from __future__ import annotations

import re

import pytest

from drive_page import open_screen, wait_until_idle, write

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PROMPT, SUBJECT = "The mother tongue of Danielle Darrieux is", "Danielle Darrieux"
VALUE = "document.querySelector('#{} textarea, #{} input')?.value"


def value(tab, name: str) -> str:
    return tab.evaluate(VALUE.format(name, name))


def wait_for_value(tab, name: str, wanted: str) -> None:
    tab.wait_for_function(f"wanted => {VALUE.format(name, name)} === wanted", arg=wanted)


def trace(tab, prompt: str = PROMPT, subject: str = SUBJECT) -> None:
    """Traces the prompt and waits for the map."""
    open_screen(tab, "Where")
    write(tab, **{"where-prompt": prompt, "where-subject": subject})
    tab.click("#trace")
    tab.locator("#said .lead", has_text=f"“{subject}”").wait_for()
    wait_until_idle(tab)


def cell(tab, kind: str, token: int, layer: int):
    return tab.locator(f'#map .cell[data-kind="{kind}"][data-token="{token}"][data-layer="{layer}"]')


def place_of_focus(tab) -> list[str]:
    return tab.evaluate("(({ kind, token, layer }) => [kind, token, layer])(document.activeElement.dataset)")


def wait_for_sentence(tab, beginning: str) -> str:
    tab.locator("#cell p", has_text=re.compile(f"^{re.escape(beginning)}")).wait_for()
    return tab.inner_text("#cell p")


def test_a_trace_says_what_it_shows_and_a_cell_what_it_is_and_an_edit_begins_there(open_tab):
    tab = open_tab()
    write(tab, target="English")
    trace(tab)
    assert tab.inner_text("#said .lead").startswith(f"With “{SUBJECT}” corrupted, “French” falls from 9")
    assert tab.locator("#map svg").count() == 3 and tab.locator("#map .cell").count() == 3 * 11 * 6
    underlined = tab.locator('#map svg >> nth=0 >> .token[text-decoration="underline"]').all_text_contents()
    assert underlined == ["Danielle"] * 2 + ["Darrieux"] * 4
    assert not tab.locator("#edit-here").is_visible()
    colours = {
        cell(tab, "hidden", *at).evaluate("e => getComputedStyle(e).fill") for at in ((0, 0), (10, 0), (10, 5))
    }
    assert len(colours) == 3, "a state that brings nothing back, one that brings a part, one that brings all"

    cell(tab, "mlp", 9, 2).click()
    said = wait_for_sentence(tab, "With the MLP of layer 2 restored at the subject's last token, “ux”, “French” has ")
    title = cell(tab, "mlp", 9, 2).locator("title").text_content()
    assert title.removeprefix("“ux”, layer 2: ") in said.replace("\u00a0", " ")
    tab.get_by_role("button", name="Edit at layer 2").click()
    wait_for_value(tab, "layer", "2")
    assert tab.locator("#go").is_visible() and (value(tab, "prompt"), value(tab, "subject")) == (PROMPT, SUBJECT)
    assert value(tab, "target") == "English", "what was written there before stays"
    tab.click("#go")
    tab.locator("#tried .sides").wait_for()
    assert "transformer.h.2.mlp" in tab.inner_text("#tried")


def test_cells_are_reached_and_asked_by_the_keyboard(open_tab):
    tab = open_tab()
    trace(tab)
    assert tab.locator('#map .cell[tabindex="0"]').count() == 1, "one stop for the tab key"
    tab.focus("#trace")
    tab.keyboard.press("Tab")
    assert place_of_focus(tab) == ["hidden", "0", "0"]
    for key in ("ArrowUp", "ArrowLeft"):
        tab.keyboard.press(key)
    assert place_of_focus(tab) == ["hidden", "0", "0"], "the edge of the map"
    for key in ("ArrowDown", "ArrowDown", "End"):
        tab.keyboard.press(key)
    assert place_of_focus(tab) == ["hidden", "2", "5"]
    tab.keyboard.press("ArrowRight")
    assert place_of_focus(tab) == ["mlp", "2", "0"], "on to the next panel"
    tab.keyboard.press("Enter")
    wait_for_sentence(tab, "With the MLP of layer 0 restored at a token before the subject, “tongue”")
    assert place_of_focus(tab) == ["mlp", "2", "0"], "the answer does not take the focus away"
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press(" ")
    wait_for_sentence(tab, "With the hidden state of layer 5 restored at a token before the subject, “tongue”")
    assert tab.locator("#map .cell.chosen").count() == 1


def test_a_reload_keeps_the_trace_and_the_cell(open_tab):
    tab = open_tab()
    trace(tab)
    cell(tab, "attention", 10, 0).click()
    said = wait_for_sentence(tab, "With attention in layer 0 restored at the prompt's last token, “is”")
    lead = tab.inner_text("#said .lead")
    tab.reload()
    open_screen(tab, "Where")
    tab.locator("#map .heat").wait_for()
    assert (tab.inner_text("#cell p"), tab.inner_text("#said .lead")) == (said, lead)
    assert (value(tab, "where-prompt"), value(tab, "where-subject")) == (PROMPT, SUBJECT)
    assert tab.locator("#map .ring.lasting").count() == 1
    assert "chosen" in cell(tab, "attention", 10, 0).get_attribute("class")
    tab.get_by_role("button", name="Edit at layer 0").click()
    wait_for_value(tab, "layer", "0")


def test_a_cell_that_the_trace_does_not_have_is_refused_and_not_kept(open_tab):
    tab = open_tab()
    trace(tab)
    cell(tab, "hidden", 0, 0).evaluate("e => { e.dataset.layer = 99; }")
    tab.locator('#map .cell[data-layer="99"]').click()
    wait_for_sentence(
        tab, "expected a cell of hidden, mlp, attention with 11 tokens and 6 layers; got hidden at token 0"
    )
    assert not tab.locator("#edit-here").is_visible()
    tab.reload()
    open_screen(tab, "Where")
    wait_for_sentence(tab, "Click a cell")


def test_the_prompt_goes_along_from_one_screen_to_the_other(open_tab):
    tab = open_tab()
    write(tab, prompt="Paris is the capital of", subject="Paris")
    open_screen(tab, "Where")
    wait_for_value(tab, "where-prompt", "Paris is the capital of")
    wait_for_value(tab, "where-subject", "Paris")
    write(tab, **{"where-prompt": "Rome is the capital of"})
    tab.locator("#where-prompt textarea").evaluate(
        "e => { e.focus(); e.setSelectionRange(0, 4); e.dispatchEvent(new Event('select')); }"
    )
    wait_for_value(tab, "where-subject", "Rome")
    open_screen(tab, "Edit")
    wait_for_value(tab, "prompt", "Rome is the capital of")
    wait_for_value(tab, "subject", "Rome")
    write(tab, prompt="Oslo is the capital of", subject="Oslo")
    open_screen(tab, "Stack")
    open_screen(tab, "Edit")
    open_screen(tab, "Where")
    wait_for_value(tab, "where-prompt", "Oslo is the capital of")
    assert (value(tab, "prompt"), value(tab, "subject")) == ("Oslo is the capital of", "Oslo")


@pytest.mark.parametrize(
    ("prompt", "subject", "said"),
    [
        (PROMPT, "", "expected a subject, on which noise is put; got none: select it in the prompt with the mouse"),
        ("", "", "expected a request; got none"),
        (PROMPT, "Napoleon", "expected the subject “Napoleon” in the request"),
        ("word " * 3000 + SUBJECT, SUBJECT, "expected texts of at most"),
    ],
)
def test_what_cannot_be_traced_is_told_in_a_sentence(open_tab, prompt, subject, said):
    tab = open_tab()
    open_screen(tab, "Where")
    write(tab, **{"where-prompt": prompt, "where-subject": subject})
    tab.click("#trace")
    assert said in tab.inner_text("#status .warn")
    assert "Nothing traced yet" in tab.inner_text("#said")


def test_a_trace_is_cancelled_in_its_midst_and_what_was_traced_before_stays(open_tab):
    tab = open_tab()
    trace(tab)
    before = tab.inner_text("#said .lead")
    long = "Of those who came, and of all who read and wrote and spoke, " * 5 + PROMPT
    write(tab, **{"where-prompt": long, "where-subject": SUBJECT})
    tab.click("#trace")
    tab.get_by_text("restoring").wait_for()
    tab.click("#cancel")
    tab.get_by_text("Cancelled: the model and the stack are as before.").wait_for()
    wait_until_idle(tab)
    assert tab.inner_text("#said .lead") == before
    trace(tab, "The capital of France is", "France")
    assert tab.inner_text("#said .lead").startswith("With “France” corrupted, “Paris” falls")


def test_what_was_written_is_shown_as_text(open_tab):
    tab = open_tab()
    tab.on("dialog", lambda dialog: pytest.fail("a script ran"))
    hostile = "<img src=x onerror=alert(1)> ${alert(1)} {{{{x}}}}"
    trace(tab, f"{hostile} is", hostile)
    assert "<img src=x onerror=alert(1)>" in tab.inner_text("#said .lead")


def test_the_map_is_readable_in_the_dark_and_on_a_phone(open_tab):
    tab = open_tab(color_scheme="dark")
    trace(tab)
    tab.set_viewport_size({"width": 390, "height": 844})  # the last screens are in a menu there
    panels = tab.locator("#map svg")
    boxes = [panels.nth(number).bounding_box() for number in range(3)]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes), "nothing scrolls sideways"
    assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"], "one below the other"
    ink = tab.locator("#map .token .piece").first.evaluate("e => getComputedStyle(e).fill")
    paper = tab.locator("#map .cell").first.evaluate("e => getComputedStyle(e).stroke")
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert light[0] > 3 * 180 and light[1] < 3 * 60
    cell(tab, "attention", 9, 0).click()
    wait_for_sentence(tab, "With attention in layer 0 restored")
    box, place = tab.locator("#cell p").bounding_box(), cell(tab, "attention", 9, 0).bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] < place["y"] < 844, "the sentence is in sight, above the cell"
