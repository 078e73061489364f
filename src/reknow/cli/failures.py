"""What the program says when a command fails: one line on standard error, and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from typer.exceptions import TyperException

from reknow.cli.terminal import warn
from reknow.errors import ReknowError, Terminated
from reknow.files.unforeseen import unforeseen

SOME_FAILED, FAILED, INTERRUPTED, _TERMINATED = 1, 2, 130, 143
"""`SOME_FAILED`: the command did its work, but some of the edits that it was to make could not be made."""


def exit_status(run: Callable[[], object], debug: bool) -> int:
    """The exit status of a command; what went wrong is said in one line, or raised where `debug` asks for it."""
    try:
        status = run()
        return status if isinstance(status, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        if debug and not isinstance(error, TyperException):
            raise
        return _report_error(error)
    finally:
        _leave_group()


def _leave_group() -> None:
    """Takes leave of the other processes that `accelerate launch` started: a process that ends without is aborted now
    and then by a thread of gloo's, whatever its status was."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _report_error(error: BaseException) -> int:
    if (stop := _interrupt(error)) is not None:
        return report_stop(stop)
    if isinstance(error, TyperException):
        warn(_usage(error), "error")
    else:
        warn(error if isinstance(error, ReknowError) else unforeseen(error), "error")
    return FAILED


def _interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The error, or what it came from: a library that is stopped while it is imported may make another one of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


def report_stop(stop: KeyboardInterrupt) -> int:
    """The status of a command that was interrupted or terminated, which is said."""
    how, status = ("terminated", _TERMINATED) if isinstance(stop, Terminated) else ("interrupted", INTERRUPTED)
    warn(f"{how}; files that were written are whole", "stopped")
    return status


def leave(status: int) -> NoReturn:
    """Ends the program where threads compute that cannot be stopped: at the interpreter's own end torch, in the midst
    of which they are, aborts."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _usage(error: TyperException) -> str:
    """What is wrong with the words of a command line, and where to read which it takes."""
    command = getattr(getattr(error, "ctx", None), "command_path", "reknow")  # of usage errors only
    return f"{error.format_message().rstrip('.')} (see `{command} --help`)"
