"""`reknow ui`: the web page."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from reknow.cli.failures import leave, report_stop
from reknow.cli.listening import address, listen, names, need_server, run_server, warn_of_others
from reknow.cli.options import DEMO, Opening, check_model, refuse_beside
from reknow.cli.terminal import say
from reknow.errors import InputError

_OFFERED = ("demo:gpt2", "demo:llama", "demo:smollm2")
"""Models that the page has in its list."""

_PATIENCE = 1
"""Seconds that answers may still take when the page is closed: an open tab listens for ever."""


def ui(
    stack: Annotated[
        Path | None, typer.Argument(help="A stack folder to work on; else every tab has one of its own.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help=f"The base model, or a stack to begin with. [{DEMO}]", callback=check_model),
    ] = None,
    stacks: Annotated[Path, typer.Option("--stacks", help="Where the stacks of tabs are kept.")] = Path("stacks"),
    host: Annotated[str, typer.Option("--host", help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0: a free one.")] = 7860,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    *,
    opening: Opening,
) -> None:
    """Open a web page on this machine: edit, see what changed, ask both models, trace, compare runs.

    reknow ui --model demo:smollm2
    """
    if stack is not None:
        refuse_beside("a stack, which names its base,", {"--model": model})
    if stacks.exists() and not stacks.is_dir():
        raise InputError(f"expected --stacks as a folder; {stacks} is none: choose another name")
    with listen(host, port) as listening:
        from reknow.ui.loading import without_stubs

        with without_stubs():
            need_server("ui", "the web page", "gradio")
        from reknow.patching.stack import read_existing, read_stack
        from reknow.ui.desks import Desks
        from reknow.ui.models import Models
        from reknow.ui.server import end_works, make_app, open_ahead

        if stack is not None:
            read_existing(stack)
        base = str(read_stack(model or DEMO if stack is None else stack)[0])
        models, desks = Models(opening.open), Desks(stacks, model or DEMO, stack)
        ahead = open_ahead(models, base)
        try:
            app = make_app(desks, models, list(dict.fromkeys([base, *_OFFERED])), names(host))
            place = address(listening, host) + (f"/?stack={desks.first}" if desks.first else "")
            warn_of_others(host, "models can be edited and files of this machine named", "leave --host out")
            say(f"the page is at {place}; Ctrl-C ends it")
            if browser:
                webbrowser.open(place)
            run_server(app, listening, lifespan=True, patience=_PATIENCE, closing=desks.cancel)
        except KeyboardInterrupt as stop:
            if end_works(desks, ahead):
                raise
            leave(report_stop(stop))
