"""The real page, `reknow ui` as a program, in real tabs of a real Chromium."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving_process import Served, listening

PATIENCE = 120_000
"""Milliseconds for what takes the machine long when it is busy."""


@pytest.fixture(scope="module")
def page_folder(tmp_path_factory) -> Path:
    """The folder in which the page was started."""
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def page_process(page_folder) -> Iterator[Served]:
    """The page on the bundled model."""
    with listening("ui", folder=page_folder) as served:
        yield served


UNLOADED = ("AbortError: signal is aborted", "Connection errored out")
"""What gradio says of its streams when a tab that is loaded anew, or closed, ends them."""


def _is_error(message: Any) -> bool:
    return message.type == "error" and not any(text in message.text for text in UNLOADED)


@pytest.fixture
def open_tab(page_process, chromium) -> Iterator[Callable[..., Any]]:
    """Opens a tab on the page, by its address or a part of it, and waits until it is there. At the end no tab has
    asked anybody else for anything, and none has said an error on its console."""
    asked: list[str] = []
    said: list[str] = []
    contexts: list[Any] = []

    def visit(address: str = "/", **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1400, "height": 1000}, **options})
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(PATIENCE)
        tab.on("console", lambda message: said.append(message.text) if _is_error(message) else None)
        tab.on("pageerror", lambda error: said.append(str(error)))
        ours = (page_process.address, "data:", "blob:", "about:")
        tab.on("request", lambda request: None if request.url.startswith(ours) else asked.append(request.url))
        tab.goto(address if "://" in address else page_process.address + address)
        tab.locator("#stack-line .note").wait_for()  # what a load fills in is there
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert asked == [] and said == [], f"asked for {asked}, said {said}"
