"""The page as an application that answers at an address of this machine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from reknow.display import clock
from reknow.errors import ReknowError
from reknow.ui.access import Access
from reknow.ui.compare import ADDRESS
from reknow.ui.desks import Desks
from reknow.ui.models import Models
from reknow.ui.page import build_page, look
from reknow.ui.work import collect_warnings

_PATIENCE = 5
"""Seconds that works have to end when the page is closed."""


def make_app(desks: Desks, models: Models, choices: list[str], hosts: Sequence[str] | None) -> FastAPI:
    """The application.

    Args:
        hosts: names by which it may be called, so that no page of another site can; None: any.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.get(f"/{ADDRESS}", response_class=HTMLResponse)(partial(_runs_page, desks))
    collect_warnings()
    access = Access()
    page = build_page(desks, models, choices, access)
    return gr.mount_gradio_app(
        app, page, path="/", max_file_size=access.upload, show_error=False, ssr_mode=False, **look()
    )


def _runs_page(desks: Desks, stack: str) -> HTMLResponse:
    """What the last screen of a desk shows."""
    desk = desks.known(stack)
    if desk is None or desk.runs is None:
        return HTMLResponse("expected runs that were chosen; got none: choose some on the page", status_code=404)
    return HTMLResponse(desk.runs.html)


def open_ahead(models: Models, name: str) -> threading.Thread:
    """Opens a model before it is asked for, in a thread; what is wrong with it is told to who asks."""

    def work() -> None:
        with suppress(ReknowError), models.using(name):
            pass

    thread = threading.Thread(target=work, name="reknow page: opening", daemon=True)
    thread.start()
    return thread


def end_works(desks: Desks, opening: threading.Thread) -> bool:
    """Cancels what goes on and waits a little for its end; whether no thread computes any more."""
    end = clock() + _PATIENCE
    works = desks.cancel()
    ended = [work.wait(max(0.0, end - clock())) for work in works]
    opening.join(max(0.0, end - clock()))
    return all(ended) and not opening.is_alive()
