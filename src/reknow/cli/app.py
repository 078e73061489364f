"""The table of commands, and what happens to errors: one line on stderr and an exit status."""

from __future__ import annotations

import logging
import warnings
from typing import Annotated

import typer
from typer.core import TyperGroup

from reknow import __version__
from reknow.cli import editing, instructing, measuring, stacks, statistics, studying, tracing, training
from reknow.cli.demo import demo
from reknow.cli.terminal import warn
from reknow.errors import ReknowError, Terminated

FAILED, INTERRUPTED, TERMINATED = 2, 130, 143


class _Group(TyperGroup):
    """Turns what the library refuses into one line; `--debug`, anywhere in the line, shows the traceback."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        asked = [argument for argument in args if argument == "--debug"]
        return super().parse_args(ctx, asked + [argument for argument in args if argument != "--debug"])

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except ReknowError as error:
            if ctx.params["debug"]:
                raise
            warn(error, "error")
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt as stop:
            if ctx.params["debug"]:
                raise
            how, status = ("terminated", TERMINATED) if isinstance(stop, Terminated) else ("interrupted", INTERRUPTED)
            warn(f"{how}; files that were written are whole", "stopped")
            raise typer.Exit(status) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Change what a language model knows, one fact at a time, and prove what changed and what did not.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"reknow {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say what is being computed.")] = False,
) -> None:
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level, force=True)
    warnings.showwarning = lambda message, *_: warn(message)


for command in (
    demo,
    editing.edit,
    stacks.apply,
    stacks.revert,
    stacks.merge,
    stacks.export,
    stacks.show,
    stacks.diff,
    tracing.trace,
    training.train,
    statistics.stats,
    instructing.instruct,
    studying.study,
    measuring.bench,
    measuring.report,
    measuring.methods,
):
    app.command()(command)


def main() -> None:
    """The program `reknow`."""
    app()
