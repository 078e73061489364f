"""Takes the pictures of the tour of the page, docs/figures/page_*.png, from a real page in a real browser.

    python scripts/page_pictures.py                    all of them
    python scripts/page_pictures.py edit_light ask     some; --out FOLDER: elsewhere

Everything in them is made anew: the edits, the answers, a trace, and two runs of six facts to compare.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from drive_page import REQUEST, keep, open_screen, try_edit, wait_until_idle, write

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
PATIENCE = 120_000
"""Milliseconds."""
RUNS = {"rome": ["--methods", "rome,ft-m"], "memories": ["--methods", "grace,ike"]}
WIDE, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}


def edit(tab: Any) -> None:
    try_edit(tab, "rome")


def stack(tab: Any) -> None:
    try_edit(tab, "rome")
    keep(tab, "told so by her")
    facts = {"prompt": "The official religion of Edwin of Northumbria is", "subject": "Edwin of Northumbria"}
    try_edit(tab, "grace", **facts, target="Islam")
    keep(tab, "an example")
    open_screen(tab, "Stack")
    tab.locator("#patches").get_by_text("told so by her").first.wait_for()


def ask(tab: Any) -> None:
    try_edit(tab, "rome")
    keep(tab, "told so by her")
    open_screen(tab, "Ask")
    for question in ("The mother tongue of Danielle Darrieux is", "The mother tongue of Jean Galland is"):
        write(tab, question=question)
        tab.click("#ask")
        tab.locator("#asked").get_by_text(question).first.wait_for()
        wait_until_idle(tab)


def where(tab: Any) -> None:
    open_screen(tab, "Where")
    write(tab, **{"where-prompt": REQUEST["prompt"], "where-subject": REQUEST["subject"]})
    tab.click("#trace")
    tab.locator("#map svg").first.wait_for()
    wait_until_idle(tab)
    tab.locator("#map [data-kind=hidden][data-layer='2']").last.click()
    tab.locator("#edit-here").wait_for()


def compare(tab: Any) -> None:
    open_screen(tab, "Compare")
    for box in tab.locator("#runs input").all():
        box.check()
    tab.click("#show-runs")
    tab.locator("#compared iframe").wait_for()
    wait_until_idle(tab)
    tab.frame_locator("#compared iframe").get_by_text("best").first.wait_for()


PICTURES: dict[str, tuple[Callable[[Any], None], dict[str, int], str]] = {
    "edit_light": (edit, WIDE, "light"),
    "edit_dark": (edit, WIDE, "dark"),
    "edit_phone": (edit, PHONE, "light"),
    "stack": (stack, WIDE, "light"),
    "ask": (ask, WIDE, "light"),
    "where": (where, WIDE, "light"),
    "compare": (compare, {"width": 1400, "height": 1480}, "light"),
}


def take(browser: Browser, address: str, name: str, out: Path) -> None:
    make, size, scheme = PICTURES[name]
    tab = browser.new_context(viewport=size, color_scheme=scheme).new_page()  # type: ignore[arg-type]
    tab.set_default_timeout(PATIENCE)
    tab.goto(address)
    tab.locator("#stack-line .note").wait_for()
    make(tab)
    tab.evaluate("document.activeElement?.blur(); window.scrollTo(0, 0)")
    tab.screenshot(path=out / f"page_{name}.png", full_page=name != "compare")
    tab.context.close()
    print(out / f"page_{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--out", type=Path, default=FIGURES)
    parser.add_argument("--chromium", help="the program of the browser; else Playwright's own")
    options = parser.parse_args()
    names = options.names or list(PICTURES)
    if unknown := set(names) - set(PICTURES):
        parser.error(f"expected names among {', '.join(PICTURES)}; got {', '.join(unknown)}")
    env = os.environ | {"REKNOW_BY": "you", "REKNOW_PROGRESS": "0"}
    program = [sys.executable, "-m", "reknow"]
    folder = Path(tempfile.gettempdir(), "facts")  # a name that may be read in a picture
    folder.mkdir()
    try:
        if "compare" in names:
            for name, methods in RUNS.items():
                words = ["bench", "--data", "counterfact", "--limit", "6", "--no-fluency", "--out", f"runs/{name}"]
                subprocess.run(
                    [*program, *words, *methods], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL
                )
        page = subprocess.Popen(
            [*program, "ui", "--port", "0"], cwd=folder, env=env, stdout=subprocess.PIPE, text=True
        )
        try:
            assert page.stdout is not None
            found = re.search(r"http://\S+?:\d+", page.stdout.readline())
            assert found, "the page says its address first"
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
                for name in names:
                    take(browser, found[0], name, options.out)
                browser.close()
        finally:
            page.terminate()
            page.wait()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
