"""What the program says when a command fails: one line on standard error, and an exit status."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from typer.exceptions import TyperException

from reknow.cli.terminal import warn
from reknow.errors import ReknowError, Terminated

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
        warn(error if isinstance(error, ReknowError) else _unforeseen(error), "error")
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


def _usage(error: TyperException) -> str:
    """What is wrong with the words of a command line, and where to read which it takes."""
    command = getattr(getattr(error, "ctx", None), "command_path", "reknow")  # of usage errors only
    return f"{error.format_message().rstrip('.')} (see `{command} --help`)"


def _unforeseen(error: BaseException) -> str:
    """The sentence for what the library did not raise on purpose."""
    if isinstance(error, OSError) and error.strerror:
        place = f" at {error.filename}" if error.filename is not None else ""
        return (
            f"expected to read and write what the command needs; got {error.strerror}{place}: make room or give "
            f"access, or name another place"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            "expected enough memory; got none for the next step: take a smaller --dtype, fewer edits at a time or a "
            "smaller model"
        )
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"expected no failure here; got {what[:500]}: {_save_traceback(error)}"


def _save_traceback(error: BaseException) -> str:
    """What to do with the traceback, which is kept in a file if that can be written."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="reknow-", suffix=".txt", delete=False
        ) as file:
            file.write(f"{sys.argv}\n\n{text}")
    except OSError:
        return "give --debug to see where, and report it"
    return f"where is in {Path(file.name)}, report it; --debug shows it too"
