"""The last screen, in a browser: a run's report inside the page, several side by side, and what cannot be shown."""

from __future__ import annotations

import pytest

from drive_page import write
from synthetic_runs import make_results, write_run

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def runs(page_folder):
    """Three runs below the folder of the page: two on the same cases, of which one is not finished."""
    write_run(page_folder / "runs/first", make_results({"rome": ([1] * 12, [0, 0] + [1] * 10)}, subject="Place {}"))
    second = make_results({"ft-m": ([1] * 9 + [0] * 3, [1] * 12)}, subject="Place {}")
    del second.rows["ft-m", 0, "single", "after_edit", "set/11"]  # type: ignore[attr-defined]
    write_run(page_folder / "runs/second", second)
    write_run(page_folder / "elsewhere", make_results({"rome": ([1], [1])}, name="<b>other</b>"))
    (page_folder / "broken").mkdir()
    (page_folder / "broken/manifest.json").write_text("{")


@pytest.fixture
def tab(open_tab):
    tab = open_tab()
    open_screen(tab)
    return tab


def open_screen(tab) -> None:
    tab.get_by_role("tab", name="Compare").click()
    tab.locator("#runs label").nth(2).wait_for()


def choose(tab, *names: str) -> None:
    for name in names:
        tab.get_by_role("checkbox", name=name).check()
    tab.click("#show-runs")


def report(tab):
    return tab.frame_locator("#compared iframe")


def test_one_run_is_shown_whole_with_its_filters(tab):
    lines = tab.locator("#runs label").all_inner_texts()
    assert "elsewhere · rome · 1 case of <b>other</b> · made up · 2026-01-02" in [line.strip() for line in lines]
    choose(tab, "runs/first")
    inside = report(tab)
    inside.locator("tr.case").first.wait_for()
    assert inside.locator("h1").inner_text() == "rome on set" and inside.locator("tr.case").count() == 12
    inside.locator("#show").select_option("damage")
    inside.locator("#search").fill("place 1")
    assert inside.locator("#count").inner_text() == "1 of 12 cases"
    inside.locator("#search").fill("nowhere")
    inside.locator("#search").fill("place")
    frame = "document.querySelector('#compared iframe')"
    alike = f"Math.abs({frame}.clientHeight - {frame}.contentDocument.documentElement.getBoundingClientRect().height)"
    tab.wait_for_function(f"{alike} <= 1")
    inside.get_by_role("link", name="what was run").click()
    tab.wait_for_function("window.scrollY > 200")


def test_several_are_compared_and_there_after_a_reload(tab):
    choose(tab, "runs/first", "runs/second")
    heading = report(tab).locator("h1", has_text="2 runs on the same cases")
    heading.wait_for()
    assert "second: This run is not finished: 11 of 12 cases" in report(tab).locator("header").inner_text()
    tab.reload()
    tab.locator("#stack-line .note").wait_for()
    open_screen(tab)
    heading.wait_for()
    assert tab.locator("#runs input:checked").count() == 2
    with tab.expect_popup() as opened:
        tab.get_by_text("Open it in a tab of its own").click()
    assert opened.value.locator("h1").inner_text() == "2 runs on the same cases"


def test_what_cannot_be_shown_is_told_in_a_sentence(tab, page_folder):
    said = tab.locator("#status .warn")
    tab.click("#show-runs")
    tab.get_by_text("expected a run, or several; got none").wait_for()
    for path in ("broken", "nowhere/<img src=x onerror=alert(1)>", str(page_folder / "runs")):
        write(tab, **{"run-path": path})
        tab.click("#show-runs")
        if path.endswith("runs"):
            report(tab).locator("h1", has_text="2 runs on the same cases").wait_for()
        else:
            tab.get_by_text(f"expected a run folder with manifest.json; {path} has none that can be read").wait_for()
    write(tab, **{"run-path": ""})
    choose(tab, "runs/first", "elsewhere")
    said.filter(has_text="expected runs that have cases in common; got none among first 12, elsewhere 1").wait_for()
