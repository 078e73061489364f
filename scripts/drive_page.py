"""What a person does on the page of `reknow ui`, done by a program in a browser: for tests and for pictures."""

from __future__ import annotations

from typing import Any

REQUEST = {
    "prompt": "The mother tongue of Danielle Darrieux is",
    "subject": "Danielle Darrieux",
    "target": "English",
}
_DRAWN_TWICE = """() => new Promise(done =>
    requestAnimationFrame(() => setTimeout(() => requestAnimationFrame(() => setTimeout(done)))))"""
_OLD = "document.querySelectorAll('#tried .tried, #status p').forEach(old => old.setAttribute('data-old', ''))"


def write(tab: Any, **texts: str) -> None:
    """Writes into the fields of the form, by their ids."""
    for name, text in texts.items():
        tab.fill(f"#{name} textarea, #{name} input", text)


def wait_until_idle(tab: Any) -> None:
    """Until no work of the tab goes on."""
    tab.locator("#cancel").wait_for(state="hidden")


def pass_over_what_is_told(tab: Any) -> None:
    """What is told already is no answer to what is done next."""
    tab.evaluate(_OLD)


def wait_until_told(tab: Any) -> None:
    """Until something new is told: that it went well, or what went wrong."""
    tab.locator("#status .note:not([data-old]), #status .warn:not([data-old])").first.wait_for()
    wait_until_idle(tab)


def open_screen(tab: Any, name: str) -> None:
    """Opens the screen of that name, and waits until its fields have what comes along with it: what is written sooner
    than any person could is written over."""
    tab.get_by_role("tab", name=name, exact=True).click()
    tab.evaluate(_DRAWN_TWICE)


def try_edit(tab: Any, method: str = "ft-m", **texts: str) -> None:
    """Fills the form, tries the edit, and waits for what it did."""
    write(tab, **{**REQUEST, **texts})
    tab.locator(f"#suggested input[value='{method}']").check()
    pass_over_what_is_told(tab)
    tab.click("#go")
    tab.locator("#tried .tried:not([data-old]), #status .warn:not([data-old])").first.wait_for()
    wait_until_idle(tab)


def keep(tab: Any, why: str = "") -> None:
    """Keeps what was tried."""
    write(tab, why=why)
    pass_over_what_is_told(tab)
    tab.click("#keep")
    wait_until_told(tab)
