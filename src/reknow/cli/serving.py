"""`reknow serve`: a server that speaks OpenAI's protocol over one base model and many stacks."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.listening import address, listen, names, need_server, run_server, warn_of_others
from reknow.cli.options import DEMO, TalkOpening, check_model, read_chat
from reknow.cli.terminal import say
from reknow.errors import InputError
from reknow.files.outputs import STACK_FILE
from reknow.progress import progress

if TYPE_CHECKING:
    from reknow.lm import LM


def serve(
    stacks: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Stacks: folders, or hub:owner/name; each is asked by the name of its folder.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help=f"The base model, where no stack names one. [{DEMO}]", callback=check_model),
    ] = None,
    new: Annotated[bool, typer.Option("--new", help="Stacks that are not there yet begin empty.")] = False,
    host: Annotated[str, typer.Option("--host", help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0: a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="REKNOW_TOKEN", help="What clients must send as their API key."),
    ] = None,
    *,
    opening: TalkOpening,
) -> None:
    """Serve stacks over one base model to any client of OpenAI's API: the name of the model picks the stack.

    reknow serve mine --port 8000
    """
    need_server("serve", "a server", "uvicorn")
    from reknow.files.hub import is_address, local
    from reknow.serving.answers import Desk
    from reknow.serving.app import make_app
    from reknow.serving.stacks import Stacks, stack_names

    folders = [local(stack) for stack in stacks or []]
    if missing := [] if new else [folder for folder in folders if not (folder / STACK_FILE).exists()]:
        raise InputError(
            f"expected a stack folder at {missing[0]}; there is none: check the name, or give --new for a stack that "
            "begins with its first patch"
        )
    base = _base(folders, model)
    served_as = Path(base).name if Path(base).exists() else base
    named = stack_names(stacks or [], served_as)
    fixed = [name for name, given in zip(named, stacks or [], strict=True) if is_address(given)]
    listening = listen(host, port)
    with listening:
        with progress.shown("serve"):
            lm = _open(opening, base)
        desk = Desk(lm)
        check = lambda patches: desk.do(lambda lm: lm.restack(patches)).result()  # noqa: E731
        served = Stacks(base, served_as, lm.fingerprint, named, check, fixed)
        app = make_app(desk, served, token, names(host))
        _say_where(listening, host, token, [served_as, *named])
        for name, folder in named.items():
            if not (folder / STACK_FILE).exists():
                say(f"{name}: there is no stack in {folder} yet; it answers as {served_as} until its first patch")
        try:
            run_server(app, listening)
        finally:
            desk.close()


def _base(folders: list[Path], model: str | None) -> str:
    """The base model of all the stacks, or the one that is named.

    Raises:
        InputError: they have several, or another than the one that is named; or all are new, and none is named.
    """
    from reknow.patching.stack import base_name, read_stack

    bases = {} if model is None else {base_name(str(read_stack(model)[0])): "--model"}  # a stack names its own
    for folder in folders:
        base, _ = read_stack(folder)
        if base != folder:
            bases.setdefault(base_name(str(base)), str(folder))
    if len(bases) > 1:
        said = " and ".join(f"{base} ({where})" for base, where in bases.items())
        raise InputError(f"expected stacks on one base model; got {said}: serve each base by itself")
    if folders and not bases:
        raise InputError(
            f"expected --model for new stacks; there is none yet in {', '.join(map(str, folders))}: name the "
            "base model, or give the folder of a stack"
        )
    return next(iter(bases), DEMO)


def _open(opening: TalkOpening, base: str) -> LM:
    from reknow.model.chat import as_chat

    lm = opening.open(base)
    lm.chat = as_chat(read_chat(opening.chat_set), lm.tokenizer, lm.name) if opening.chat_set else None
    return lm


def _say_where(listening: socket.socket, host: str, token: str | None, names: list[str]) -> None:
    advice = "clients need the token" if token else "give a --token, or leave --host out"
    warn_of_others(host, "stacks can be asked and changed", advice)
    say(f"serving {', '.join(names)} at {address(listening, host)}/v1; Ctrl-C ends it")
