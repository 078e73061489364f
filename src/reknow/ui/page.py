"""The page: the head, the state of the work, and a tab for each screen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import gradio as gr
from gradio.themes import Base

from reknow.ui.access import Access
from reknow.ui.ask import AskScreen
from reknow.ui.compare import CompareScreen
from reknow.ui.desks import Desks
from reknow.ui.drawing import style
from reknow.ui.duel import Duel
from reknow.ui.edit import EditScreen
from reknow.ui.frame import Frame
from reknow.ui.head import Head
from reknow.ui.models import Models
from reknow.ui.stack import StackScreen
from reknow.ui.where import WhereScreen

_ADDRESS = """
(name) => {
  const address = new URL(window.location.href);
  return address.searchParams.get("stack") || name || "";
}
"""
"""The name of the desk, which the address of the tab holds."""
_REMEMBER = """
(name) => {
  const address = new URL(window.location.href);
  if (name && address.searchParams.get("stack") !== name) {
    address.searchParams.set("stack", name);
    window.history.replaceState(null, "", address);
  }
}
"""


_HOLD = 60.0
"""Seconds between two signs that a tab's stream is held open."""
_QUEUE = 64
"""Events that may wait before further ones are refused."""
_FILES_KEPT = 600, 3600
"""Seconds between two looks for files that went up or down, and those after which they are deleted."""


def build_page(desks: Desks, models: Models, choices: list[str], access: Access | None = None) -> gr.Blocks:
    """The page as gradio has it, to be mounted or launched with `look()`.

    Args:
        choices: models that are offered.
        access: what those may reach who open it; None: all of the machine.
    """
    with gr.Blocks(title="reknow", analytics_enabled=False, fill_width=True, delete_cache=_FILES_KEPT) as page:
        frame = Frame(desks, models, access or Access())
        frame.screens.append(Head(frame, choices))
        frame.build_status()
        with gr.Tabs(elem_id="screens") as frame.tabs:
            with gr.Tab("Edit", id="edit"):
                frame.screens.append(edit := EditScreen(frame))
            with gr.Tab("Stack", id="stack"):
                frame.screens.append(StackScreen(frame))
            with gr.Tab("Ask", id="ask"):
                frame.screens.append(AskScreen(frame))
            with gr.Tab("Where", id="where") as tracing:
                frame.screens.append(where := WhereScreen(frame, edit))
            with gr.Tab("Compare", id="compare") as comparing, gr.Tabs():
                if frame.access.machine:
                    with gr.Tab("Runs", id="runs"):
                        frame.screens.append(CompareScreen(frame, comparing))
                with gr.Tab("Two methods on one fact", id="duel"):
                    frame.screens.append(Duel(frame, edit))
        where.take_prompt(tracing)
        frame.connect()
        _connect(page, frame)
    return page.queue(max_size=_QUEUE)


def _connect(page: gr.Blocks, frame: Frame) -> None:
    """What happens when a page is loaded: its desk is found, or made, and what goes on there is followed."""
    fields = [one for screen in frame.screens for one in screen.fields]

    def load(name: str) -> Iterator[list[Any]]:
        desk = frame.desks.open(name or None)
        filled = [value for screen in frame.screens for value in screen.fill(desk)]
        yield [desk.name, *filled, "", gr.update(visible=desk.busy), *frame.shown(desk)]
        if desk.work is not None and desk.work.running:
            for values in frame.follow(desk, desk.work):
                yield [gr.skip(), *(gr.skip() for _ in fields), *values]

    page.load(
        load,
        [frame.name],
        [frame.name, *fields, *frame.outputs],
        js=_ADDRESS,
        show_progress="hidden",
        concurrency_limit=None,
    )
    frame.name.change(None, [frame.name], None, js=_REMEMBER)

    async def hold() -> AsyncIterator[None]:
        """Goes on as long as the tab is open. Gradio's server ends a tab's stream with its last event, and what the
        tab sends before it hears of that is never answered: so there is one event that stays."""
        while True:
            await asyncio.sleep(_HOLD)
            yield

    page.load(hold, None, None, show_progress="hidden", concurrency_limit=None)


def look() -> dict[str, Any]:
    """How the page looks, in gradio's terms: colours of the reports, fonts of the machine, nothing from elsewhere."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"]
    mono = ["ui-monospace", "DejaVu Sans Mono", "monospace"]
    theme = Base(font=fonts, font_mono=mono, primary_hue="blue", neutral_hue="slate")
    colours = {
        "body_background_fill": "var(--paper)",
        "background_fill_primary": "var(--paper)",
        "background_fill_secondary": "var(--panel)",
        "body_text_color": "var(--ink)",
        "body_text_color_subdued": "var(--soft)",
        "block_background_fill": "var(--paper)",
        "block_label_text_color": "var(--ink)",
        "block_title_text_color": "var(--ink)",
        "block_info_text_color": "var(--soft)",
        "block_border_color": "var(--line)",
        "border_color_primary": "var(--line)",
        "input_background_fill": "var(--paper)",
        "input_border_color": "var(--line)",
        "input_border_width": "1px",
        "button_primary_background_fill": "var(--link)",
        "button_primary_background_fill_hover": "var(--link)",
        "button_primary_text_color": "var(--paper)",
        "button_secondary_background_fill": "var(--panel)",
        "button_secondary_text_color": "var(--ink)",
        "color_accent": "var(--link)",
        "color_accent_soft": "var(--panel)",
    }
    dark = {f"{name}_dark": value for name, value in colours.items() if f"{name}_dark" in dir(theme.set())}
    head = f"<style>{style()}</style>"  # as `css` gradio would rewrite it, and lose the dark colours
    return {"theme": theme.set(**colours, **dark), "head": head, "footer_links": [], "run_history": False}
