"""The first screen, in a browser: an edit is tried, kept, taken up after a reload; wrong requests are told of."""

from __future__ import annotations

import pytest

from drive_page import keep, try_edit, wait_until_idle, write
from reknow.patching.stack import read_existing, read_history

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def stack_of(tab) -> str:
    return tab.url.partition("stack=")[2]


def test_an_edit_is_tried_kept_and_there_after_a_reload(open_tab, page_folder):
    tab = open_tab()
    try_edit(tab, "rome")
    assert "now says English" in tab.inner_text("#tried .lead")
    before, after = (tab.inner_text(f"#tried .side >> nth={i}") for i in (0, 1))
    assert "French" in before and after.count("%") == 6, "five bars and the whole answer"
    assert tab.locator("#tried .kept tbody tr").count() == 7
    tab.reload()
    tab.locator("#tried .sides").wait_for()
    assert tab.input_value("#prompt textarea").startswith("The mother tongue")
    keep(tab, "told so by her")
    assert "1 patch on" in tab.inner_text("#stack-line")
    folder = page_folder / "stacks" / stack_of(tab) / "demo-gpt2"
    base, patches = read_existing(folder)
    assert (base, [patch.method for patch in patches]) == ("demo:gpt2", ["rome"])
    assert [line.entry.why for line in read_history(folder)] == ["told so by her"]
    try_edit(tab, target="Spanish")
    assert tab.input_value("#why input, #why textarea") == "", "the next patch has a reason of its own"
    tab.reload()
    tab.get_by_text("1 patch on").wait_for()


def test_the_subject_is_what_is_selected_in_the_request(open_tab):
    tab = open_tab()
    write(tab, prompt="Paris is the capital of the country of")
    tab.focus("#prompt textarea")
    tab.keyboard.press("Home")
    for _ in "Paris":
        tab.keyboard.press("Shift+ArrowRight")
    tab.wait_for_function("document.querySelector('#subject input, #subject textarea').value === 'Paris'")
    tab.keyboard.press("Shift+End")  # all of it is no subject
    tab.dblclick("#prompt textarea", position={"x": 20, "y": 18})
    assert tab.input_value("#subject input, #subject textarea") == "Paris"


def test_a_model_that_does_not_open_does_not_stay_in_its_field(open_tab):
    tab = open_tab()
    tab.fill("#model input", "no/such-model")
    tab.press("#model input", "Enter")
    tab.locator("#status .warn").wait_for()
    wait_until_idle(tab)
    tab.wait_for_function("document.querySelector('#model input').value === 'demo:gpt2'")


def test_a_fact_of_a_bundled_set_is_asked_in_other_words_too(open_tab):
    tab = open_tab()
    tab.click("#facts button")
    tab.click("#set input")
    tab.get_by_role("option", name="counterfact", exact=True).click()
    tab.click("#fact input")
    tab.get_by_role("option", name="Danielle Darrieux").first.click()
    tab.wait_for_function("document.querySelector('#subject input, #subject textarea').value === 'Danielle Darrieux'")
    tab.locator("#suggested input[value='ft-m']").check()
    tab.click("#go")
    tab.locator("#tried .sides").wait_for()
    assert "now says English" in tab.inner_text("#tried .lead")
    assert tab.get_by_text("Asked in other words").is_visible()
    assert tab.locator("#tried .bars .old").count() >= 1, "the present answer is marked among the likeliest tokens"


def test_a_question_without_a_subject_is_offered_what_can_make_it(open_tab):
    tab = open_tab()
    methods = "[...document.querySelectorAll('#suggested input')].map(e => e.value).join()"
    tab.wait_for_function(f"{methods} === 'rome,ft-m,grace'")
    write(tab, prompt="What is the capital of Australia?", target="Sydney")
    tab.wait_for_function(f"{methods} === 'ft-m,grace,ike'")
    tab.click("#go")
    tab.locator("#tried .sides").wait_for()
    assert "Sydney" in tab.inner_text("#tried .lead")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"prompt": ""}, "expected a request; got none"),
        ({"target": " "}, "expected a new answer; got none"),
        ({"subject": "Napoleon"}, "expected the subject “Napoleon” in the request"),
        ({"prompt": "<b>{x}</b> <script>alert(1)</script> is", "subject": "", "target": "${1+1} {{y}}"}, ""),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence_and_nothing_is_run_that_was_written(open_tab, texts, said):
    tab = open_tab()
    tab.on("dialog", lambda dialog: pytest.fail("a script ran"))
    try_edit(tab, **texts)
    shown = tab.inner_text("#status .warn" if said else "#tried")
    assert said in shown if said else "${1+1} {{y}}" in shown and "<script>alert(1)</script>" in shown


def test_what_was_made_before_is_called_so_once_the_form_asks_for_something_that_is_not_made(open_tab):
    tab = open_tab()
    try_edit(tab)
    assert "Made before" not in tab.inner_text("#tried")
    try_edit(tab, subject="Napoleon", target="Greek")
    assert "expected the subject “Napoleon”" in tab.inner_text("#status .warn")
    said = tab.inner_text("#tried .hint")
    assert said.startswith("Made before, and not of what the form asks for now: “The mother tongue of Danielle Darr")
    assert said.endswith("is English”, by ft-m.")
    try_edit(tab, target="Greek")
    assert "Made before" not in tab.inner_text("#tried") and "Greek" in tab.inner_text("#tried .lead")


def test_two_tabs_have_two_stacks(open_tab):
    one, other = open_tab(), open_tab()
    assert stack_of(one) != stack_of(other)
    for tab, target in ((one, "English"), (other, "Russian")):
        try_edit(tab, target=target)
    keep(one)
    other.reload()
    other.locator("#tried .sides").wait_for()
    assert "no patch yet" in other.inner_text("#stack-line") and "Russian" in other.inner_text("#tried .lead")


def test_a_long_work_is_cancelled_and_the_next_one_works(open_tab):
    tab = open_tab()
    tab.click("#more button")
    tab.click("#other input")
    tab.get_by_role("option", name="kn", exact=True).click()
    write(tab, prompt="The mother tongue of Danielle Darrieux is", subject="Danielle Darrieux", target="English")
    tab.click("#go")
    tab.locator("#status .work").wait_for()
    tab.click("#cancel")
    tab.get_by_text("Cancelled: the model and the stack are as before.").wait_for()
    wait_until_idle(tab)
    tab.click("#other input")
    tab.get_by_role("option").first.click()
    try_edit(tab)
    assert "now says English" in tab.inner_text("#tried .lead")
