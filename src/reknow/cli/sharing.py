"""Commands that share what reknow makes on the hub: push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reknow.cli.terminal import say

_Repository = Annotated[str, typer.Option("--to", help="hub:owner/name, or with a branch hub:owner/name@branch.")]


def push(
    sources: Annotated[
        list[Path],
        typer.Argument(help="A patch, a stack, an editor, or files of statistics.", show_default=False),
    ],
    to: _Repository,
    base: Annotated[
        str | None, typer.Option("--base", help="How others name the base model; a stack takes it over.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Let only you see a new repository.")] = False,
) -> None:
    """Put a patch, a stack, a trained editor or statistics on the Hugging Face hub, with a card.

    All of it is one commit. Whoever sees the repository can read the edits, and with a stack its history.
    """
    from reknow.export.sharing import gather, with_card
    from reknow.files.hub import read_address, send

    address = read_address(to)
    shared = gather(sources, base)
    files = with_card(shared, address)
    commit = send(address, files, message or f"reknow push: {shared.kind}", private=private)
    say(f"pushed {shared.kind} to {address}: {len(files)} files, commit {commit}")
    if shared.kind == "stack":
        say(f"it opens as hub:{address.repository}@{commit}")


def pull(
    source: Annotated[str, typer.Argument(help="hub:owner/name[@revision].", show_default=False)],
    out: Annotated[
        Path | None, typer.Argument(help="A new name; none for statistics, which edits find.", show_default=False)
    ] = None,
) -> None:
    """Get what `reknow push` put on the hub."""
    from reknow.export.sharing import pull as fetched
    from reknow.files.hub import read_address

    kind, places = fetched(read_address(source), out)
    for place in places:
        say(f"wrote {place}")
    say(f"{source}: {kind}")
