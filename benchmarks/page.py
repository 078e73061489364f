"""How long `reknow ui` takes from its start to the first edit shown in a browser.

    python benchmarks/page.py                        the bundled model, nothing kept of it, then once more
    python benchmarks/page.py --model demo:smollm2

The browser runs before the clock starts; the form is filled in by a program, as fast as it can. Nothing kept: the
cache is an empty folder, so that the first ROME edit reads text for its statistics too.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from playwright.sync_api import Browser, sync_playwright

STEPS = ("it answers", "the page is there", "the edit is shown")
REQUEST = {
    "prompt": "The mother tongue of Danielle Darrieux is",
    "subject": "Danielle Darrieux",
    "target": "English",
}
PATIENCE = 600_000
"""Milliseconds."""


def measure(browser: Browser, model: str, method: str, cache: Path) -> list[tuple[float, float, float]]:
    """Of each step the seconds since the start: of the clock, of the server's processors, of the browser's."""
    moments: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        own = _processor_seconds(_browser_processes(None))
        begun = time.perf_counter()
        server = subprocess.Popen(
            [sys.executable, "-m", "reknow", "ui", "--model", model, "--port", "0"],
            cwd=folder,
            env=os.environ | {"REKNOW_CACHE": str(cache), "REKNOW_PROGRESS": "0"},
            stdout=subprocess.PIPE,
            text=True,
        )

        def passed() -> None:
            now = time.perf_counter() - begun
            browsing = _processor_seconds(_browser_processes(server.pid)) - own
            moments.append((now, _processor_seconds([psutil.Process(server.pid)]), browsing))

        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+?:\d+", server.stdout.readline())
            assert found, "the page says its address first"
            passed()
            _edit(browser, found[0], method, passed)
        finally:
            server.kill()
            server.wait()
    return moments


def _edit(browser: Browser, address: str, method: str, passed: Callable[[], None]) -> None:
    tab = browser.new_page()
    tab.set_default_timeout(PATIENCE)
    tab.goto(address)
    tab.locator("#stack-line .note").wait_for()
    passed()
    for name, text in REQUEST.items():
        tab.fill(f"#{name} textarea, #{name} input", text)
    tab.locator(f"#suggested input[value='{method}']").check()
    tab.click("#go")
    tab.locator("#tried .sides").wait_for()
    passed()
    tab.close()


def _browser_processes(server: int | None) -> list[psutil.Process]:
    """The processes that this one has started, but for the server."""
    return [one for one in psutil.Process().children(recursive=True) if one.pid != server]


def _processor_seconds(processes: list[psutil.Process]) -> float:
    """User and system, of those that still run."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:gpt2")
    parser.add_argument("--method", default="rome", choices=["rome", "ft-m", "grace"])
    chosen = parser.parse_args()
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    print(f"{chosen.method} on {chosen.model}; seconds since the start: clock / server's processors / browser's\n")
    print(f"| | {' | '.join(STEPS)} |\n|---|---|---|---|")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as cache:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for kept in ("nothing kept", "statistics kept"):
            moments = measure(browser, chosen.model, chosen.method, Path(cache))
            print(
                f"| {kept} | {' | '.join(' / '.join(f'{each:.1f}' for each in one) for one in moments)} |", flush=True
            )
        browser.close()


if __name__ == "__main__":
    main()
