"""A real browser for pages that have to work in one: Chromium, through Playwright, with no way to any network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NEEDED = "REKNOW_NEED_BROWSER"
"""Where this is set, no browser is an error: tests that are never run hold nothing."""


def absent(reason: str) -> None:
    """Skips, or fails where browsers are needed."""
    if os.environ.get(NEEDED, "0") not in ("", "0"):
        pytest.fail(f"{NEEDED} is set, and {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A Chromium: the system's, else Playwright's own."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        absent("playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            absent(f"no Chromium could be started: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture
def open_page(chromium, tmp_path) -> Iterator[Callable[..., Any]]:
    """Opens a page from its HTML or its file; what it says on the console is no error, and it asks for nothing."""
    asked: list[str] = []
    said: list[str] = []
    contexts = []

    def visit(page: str | Path, **options: Any):
        file = page
        if isinstance(page, str):
            file = tmp_path / f"page{len(contexts)}.html"
            file.write_text(page, encoding="utf-8")
        context = chromium.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: said.append(str(error)))
        address = file.resolve().as_uri()
        tab.on("request", lambda request: asked.append(request.url) if request.url != address else None)
        tab.route("**/*", lambda route: route.continue_() if route.request.url == address else route.abort())
        tab.goto(address)
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert asked == [] and said == []
