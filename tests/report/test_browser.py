"""The report in a real browser: search, filter, sort, open, switch; dark, narrow, large, hostile, no script."""

from __future__ import annotations

from dataclasses import replace

import pytest

from browser import open_page  # noqa: F401, fixtures
from reknow.report import write_comparison
from reknow.report.page import render_page
from synthetic_runs import make_results

pytestmark = pytest.mark.browser

HOSTILE = '</script></b><img src=x onerror="window.hacked=1"><svg onload="window.hacked=1"> &lt;b&gt; "{}"'


@pytest.fixture(scope="module")
def page() -> str:
    """Twelve cases: `sure` misses none and changes the first two neighbours, `weak` misses the last three and fails
    in the last."""
    return render_page(
        make_results(
            {"sure": ([1] * 12, [0, 0] + [1] * 10), "weak": ([1] * 9 + [0] * 3, [1] * 12)},
            failed=[("weak", 11)],
            subject="Place {}",
        )
    )


@pytest.fixture
def tab(page, open_page):  # noqa: F811
    tab = open_page(page)
    tab.wait_for_selector("tr.case")
    return tab


def cases(tab) -> list[str]:
    return [text.split()[1] for text in tab.locator("tr.case td.request button").all_inner_texts()]


def test_the_search_narrows_the_list(tab):
    assert len(cases(tab)) == 12 and tab.inner_text("#count") == "12 of 12 cases"
    tab.fill("#search", "place 1")
    assert cases(tab) == ["1", "10", "11"] and tab.inner_text("#count") == "3 of 12 cases"
    tab.fill("#search", "OSLO place 11")
    assert cases(tab) == ["11"], "all words, in whatever case, in requests and answers"
    tab.fill("#search", "nowhere")
    assert cases(tab) == [] and "No case is like that" in tab.inner_text("#cases")
    tab.fill("#search", "")
    assert len(cases(tab)) == 12


def test_filters_show_what_went_wrong(tab):
    tab.select_option("#show", "missed")
    assert cases(tab) == ["9", "10", "11"]
    tab.select_option("#show", "damage")
    assert cases(tab) == ["0", "1"]
    tab.select_option("#method", label="weak")
    assert cases(tab) == [] and tab.locator("#cases thead th").count() == 2, "of that method alone"
    tab.select_option("#show", "failed")
    assert cases(tab) == ["11"] and "failed" in tab.inner_text("tr.case td[data-label=weak]")
    tab.select_option("#show", "well")
    assert len(cases(tab)) == 9
    tab.select_option("#method", "")
    assert cases(tab) == ["2", "3", "4", "5", "6", "7", "8"], "well with every method"


def test_relations_can_be_chosen(open_page):  # noqa: F811
    first = make_results({"one": ([1, 1, 0], [1, 1, 1])})
    second = make_results({"one": ([1, 1], [1, 1])}, prompt="{} lies in", name="other")
    for part in ("before", "rows"):
        getattr(first, part).update(getattr(second, part))
    tab = open_page(render_page(first))
    tab.wait_for_selector("tr.case")
    tab.select_option("#relation", label="… lies in (2)")
    assert tab.locator("tr.case").count() == 2 and "lies in" in tab.inner_text("tr.case")


def test_edits_that_a_sequence_forgot_are_found(open_page):  # noqa: F811
    results = make_results({"one": ([1, 1, 0], [1, 1, 1])}, mode="sequential")
    rows = {}
    for row in results.rows.values():
        end = {**row, "mode": "sequential", "stage": "end"}
        then = {**end, "stage": "after_edit"}
        if row["case"] == "set/1":  # it was right, and is no more
            missed = {"text": "Oslo", "hits": [0], "top": [2], "nll": 3.0}
            end = {**end, "readings": [{**row["readings"][0], **missed}, row["readings"][1]]}
        rows |= {("one", 0, "sequential", each["stage"], row["case"]): each for each in (end, then)}
    tab = open_page(render_page(replace(results, rows=rows)))
    tab.wait_for_selector("tr.case")
    tab.select_option("#show", "lost")
    assert cases(tab) == ["1"]
    tab.select_option("#show", "missed")
    assert cases(tab) == ["1", "2"]


def test_a_column_sorts_by_click_and_by_key(tab):
    tab.click("#cases thead button >> text=weak")
    assert cases(tab)[:3] == ["9", "10", "11"]
    header = tab.locator("#cases thead th", has_text="weak")
    assert header.get_attribute("aria-sort") == "ascending"
    assert tab.evaluate("document.activeElement.textContent") == "weak"
    tab.keyboard.press("Enter")
    assert cases(tab)[-3:] == ["11", "10", "9"] and header.get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize("how", ["mouse", "keys"])
def test_a_case_opens_with_all_its_questions(tab, how):
    row = tab.locator("tr.case").nth(9)
    button = row.locator("button")

    def press():
        if how == "mouse":
            return row.locator("td").nth(1).click()
        button.focus()
        return tab.keyboard.press("Enter")

    press()
    tab.wait_for_selector("tr.detail .probe")
    assert button.get_attribute("aria-expanded") == "true"
    detail = tab.locator("tr.detail")
    assert detail.locator(".probe").count() == 2
    asked = detail.locator(".probe").first
    assert asked.locator("dt").all_inner_texts() == ["before", "sure", "weak"]
    before, sure, weak = asked.locator("dd").all()
    assert "Oslo" in before.inner_text() and "Rome 5.0 %" in before.inner_text(), "e^-3"
    assert sure.locator("mark").inner_text() == "Rome" and "✓ new answer" in sure.inner_text()
    assert "Rome 90.5 %" in sure.inner_text(), "e^-0.1"
    assert "✗ not the new answer" in weak.inner_text() and not weak.locator("mark").count()
    press()
    assert not detail.count() and button.get_attribute("aria-expanded") == "false"


def test_the_switch_changes_table_picture_and_list(open_page):  # noqa: F811
    results = make_results({"sure": ([1, 1], [1, 1]), "weak": ([1, 1], [1, 1])})
    for row in results.rows.values():
        if row["method"] == "weak":
            row["readings"][0] |= {"hits": [0, 1], "top": [3, 1]}  # half of the answer's tokens
    tab = open_page(render_page(results))
    tab.wait_for_selector("tr.case")

    def shown() -> list[str]:
        assert tab.locator("table.verdict:visible").count() == tab.locator("#verdict figure:visible").count() == 1
        return tab.locator("table.verdict:visible tr", has_text="weak").locator("td b").all_inner_texts()

    assert shown()[0] == "100" and tab.inner_text("tr.case td[data-label=weak]") == "✓✓"
    tab.click("label[for=p-teacher_forced_tokens]")
    assert shown()[0] == "50" and tab.inner_text("tr.case td[data-label=weak]") == "0.5/1✓"
    tab.click("tr.case >> nth=0")
    tab.wait_for_selector("tr.detail")
    tab.focus("#p-teacher_forced_tokens")
    tab.keyboard.press("ArrowLeft")
    assert shown()[0] == "0" and tab.inner_text("tr.case td[data-label=weak]") == "✗✓", "every token, by key"


def test_dark_and_light_are_those_of_the_system(page, open_page):  # noqa: F811
    brightness = {}
    for scheme in ("light", "dark"):
        tab = open_page(page, color_scheme=scheme)
        colours = tab.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        brightness[scheme] = [sum(map(int, colour[4:-1].split(","))) for colour in colours]
    paper, ink = brightness["light"]
    dark_paper, dark_ink = brightness["dark"]
    assert paper > 700 > 150 > ink and dark_paper < 100 < 600 < dark_ink


@pytest.mark.parametrize("width", [390, 820])
def test_on_a_phone_or_a_tablet_nothing_sticks_out(open_page, width):  # noqa: F811
    many = {f"method-of-some-length-{i}": ([1] * 3, [1] * 3) for i in range(8)}
    for methods in (many, dict(list(many.items())[:4])):
        target = "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch"
        tab = open_page(render_page(make_results(methods, target=target)), viewport={"width": width, "height": 844})
        tab.wait_for_selector("tr.case")
        tab.click("tr.case button >> nth=0")
        tab.wait_for_selector("tr.detail .probe")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator(".verdict td >> nth=0").bounding_box()["width"] < 200, "cells lie in a grid"


def test_nothing_moves_while_the_page_is_drawn(page, open_page):  # noqa: F811
    tab = open_page(page, viewport={"width": 1400, "height": 900})
    tab.wait_for_selector("tr.case")
    moved = """new Promise(done => new PerformanceObserver(list => done(list.getEntries().map(one => one.value)))
        .observe({type: "layout-shift", buffered: true}) || setTimeout(() => done([]), 500))"""
    assert sum(tab.evaluate(moved)) < 0.02


@pytest.mark.slow
def test_thousands_of_cases_are_inside(open_page):  # noqa: F811
    count = 2005
    right = [int(i % 10 > 0) for i in range(count)]
    tab = open_page(render_page(make_results({"one": (right, right[::-1]), "two": (right[::-1], right)})))
    tab.wait_for_selector("tr.case")
    assert "the first 2000 cases" in tab.inner_text("#all") and "5 more" in tab.inner_text("#all")
    assert tab.inner_text("#count") == "2,000 of 2,000 cases" and tab.locator("tr.case").count() == 200
    tab.fill("#search", "it 1999")
    assert tab.locator("tr.case").count() == 1
    tab.click("tr.case button")
    tab.wait_for_selector("tr.detail .probe")
    assert "set/1999" in tab.inner_text("tr.detail") and "It 1999 is in" in tab.inner_text("tr.detail")
    tab.fill("#search", "")
    tab.click("#more")
    assert tab.locator("tr.case").count() == 2000 and not tab.is_visible("#more")


def test_texts_cannot_do_anything(open_page):  # noqa: F811
    results = make_results(
        {HOSTILE: ([0, 1], [0, 1]), "ft": ([1, 1], [1, 1])},
        prompt=f"{{}} {HOSTILE.replace('{}', '')}",
        subject=f"{HOSTILE} ",
        target=HOSTILE,
        failed=[(HOSTILE, 0)],
        name=HOSTILE,
    )
    results.manifest["model"] = HOSTILE
    tab = open_page(render_page(results))
    tab.wait_for_selector("tr.case")
    for button in tab.locator("tr.case button").all():
        button.click()
    tab.wait_for_selector("tr.detail .probe")
    assert tab.locator("img").count() == 0 and tab.evaluate("window.hacked") is None
    assert '<img src=x onerror="window.hacked=1">' in tab.inner_text("tr.detail >> nth=0")
    assert "&lt;b&gt;" in tab.inner_text("tr.case >> nth=0"), "as it was written, not as it reads as HTML"


def test_without_a_script_the_answer_is_there(page, open_page):  # noqa: F811
    tab = open_page(page, java_script_enabled=False)
    verdict = tab.locator("table.verdict:visible")
    assert verdict.count() == 1 and "sure" in verdict.inner_text() and "100" in verdict.inner_text()
    assert not tab.is_visible("#controls") and tab.locator("noscript .probe:visible").count()
    tab.click("label[for=p-teacher_forced_exact]")
    assert verdict.count() == 1 and verdict.get_attribute("data-p") == "teacher_forced_exact"


def test_runs_are_compared_on_a_page_of_their_own(tmp_path, open_page):  # noqa: F811
    one, two = make_results({"rome": ([1] * 6, [1] * 6)}), make_results({"ft-m": ([0] * 6, [1] * 6)})
    tab = open_page(write_comparison({"one": one, "two": two}, tmp_path), viewport={"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert "-100.0 [-100.0, -100.0]" in tab.inner_text("#differences div:visible")
    tab.click("label[for=p-teacher_forced_tokens]")
    assert tab.locator("#differences div:visible").count() == tab.locator("table.verdict:visible").count() == 1


@pytest.mark.slow
def test_it_prints_without_controls(tab):
    tab.emulate_media(media="print")
    for name in ("#controls", ".switch", "nav"):
        assert not tab.is_visible(name)
    assert tab.is_visible("table.verdict") and tab.is_visible("#cases") and tab.is_visible("#verdict svg")
    tab.set_viewport_size({"width": 700, "height": 1000})
    assert tab.evaluate("getComputedStyle(document.querySelector('.verdict tr')).display") == "table-row"
    assert tab.pdf(format="A4").startswith(b"%PDF")
