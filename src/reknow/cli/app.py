"""The table of commands, and how their words are read."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from reknow import __version__
from reknow.cli import (
    asking,
    chatting,
    checking,
    data,
    editing,
    erasing,
    exporting,
    history,
    inspecting,
    instructing,
    judging,
    layers,
    listing,
    measuring,
    paging,
    reporting,
    serving,
    sharing,
    showing,
    stacks,
    statistics,
    studying,
    tracing,
    training,
)
from reknow.cli.demo import demo
from reknow.cli.failures import FAILED, exit_status, report_stop
from reknow.cli.options import flatten
from reknow.cli.streams import forgiving_streams
from reknow.cli.terminal import LogHandler, warn
from reknow.errors import InputError
from reknow.progress import progress

_WAITING = ("serve", "ui")
"""Commands that wait for others most of the time, and show by themselves what they do before."""


class _Command(TyperCommand):
    """Says of options and arguments what was given, and refuses empty ones: `Path` would read the current folder."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in self.params:
            value = given.get(parameter.name)
            if "" in (value if isinstance(value, (list, tuple)) else [value]):
                hint = parameter.get_error_hint()  # type: ignore[attr-defined]
                raise InputError(f"expected {hint} with a value; got an empty one: fill it in, or leave it out")
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            value = error.param and given.get(error.param.name)
            if error.param is None or value is None:
                raise  # an argument is missing
            what = error.message.removeprefix("Input should be ").partition(", ")[0]
            hint, command = error.param.get_error_hint(), ctx.command_path
            raise InputError(f"expected {hint} to be {what}; got {value!r}: see `{command} --help`") from None


class _Group(TyperGroup):
    """Turns what goes wrong into one line; `--debug`, anywhere in the line, shows the traceback."""

    def main(self, args: Sequence[str] | None = None, **rest):
        words = list(sys.argv[1:] if args is None else args)
        run = partial(super().main, words, **{**rest, "prog_name": "reknow", "standalone_mode": False})
        command = next((word for word in words if not word.startswith("-")), "")

        def shown():
            with nullcontext() if command in _WAITING else progress.shown(command):
                return run()

        raise SystemExit(exit_status(shown, debug="--debug" in words))

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        for argument in args:
            try:
                argument.encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"expected arguments in UTF-8; got {argument!r}: write it so, or give the file another name"
                ) from None
        asked = [argument for argument in args if argument == "--debug"]
        return super().parse_args(ctx, asked + [argument for argument in args if argument != "--debug"])

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            if ctx.params["debug"]:
                raise
            raise typer.Exit(report_stop(stop)) from None


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Change what a language model knows, one fact at a time, and prove what changed and what did not.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"reknow {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say what is being computed.")] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level, handlers=[LogHandler()], force=True)
    warnings.showwarning = lambda message, *_: warn(message)


_COMMANDS = {
    "Edit": (demo, editing.edit, erasing.erase, asking.ask, chatting.chat, paging.ui, listing.methods),
    "Keep and take back": (history.apply, history.revert, history.log, stacks.merge, showing.show, stacks.diff),
    "Prove": (
        checking.verify,
        checking.check,
        measuring.bench,
        measuring.score,
        judging.judge,
        reporting.report,
        inspecting.inspect,
    ),
    "Deploy": (exporting.export, serving.serve, sharing.push, sharing.pull),
    "Research": (
        tracing.trace,
        layers.layers,
        training.train,
        statistics.stats,
        statistics.cache,
        instructing.instruct,
        studying.study,
    ),
}
"""The commands as `--help` shows them, in groups."""

for panel, commands in _COMMANDS.items():
    for command in commands:
        app.command(cls=_Command, rich_help_panel=panel)(flatten(command))
app.add_typer(data.commands(_Command), rich_help_panel="Prove")


def main() -> None:
    """The program `reknow`."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not spin; read when torch is loaded
    with forgiving_streams() as cut_short:
        try:
            app()
            status = 0
        except SystemExit as end:
            status = end.code
        if reason := cut_short():
            warn(f"expected to write to standard output; got {reason}: give it room; files are written", "error")
            status = FAILED
    sys.exit(status)
