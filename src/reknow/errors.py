"""What can go wrong, grouped by what the user can do about it.

Every message is one sentence with three parts: what was expected, what came, what to do.
The command line prints the message alone and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ReknowError(Exception):
    """Base of every error that the library raises on purpose."""

    def __reduce__(self):
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[ReknowError], args: tuple, state: dict[str, Any]) -> ReknowError:
    """An error that came from another process: some are made from more than they hold."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class InputError(ReknowError):
    """The request, file or option is wrong: correct it and call again."""


class TextRefused(InputError):
    """A text that the model cannot read: too long, or without tokens. A run of many cases counts the one that it
    belongs to as failed and goes on with the others."""


class EditRefused(InputError):
    """One edit that cannot be made. A run of many counts it as failed and goes on with the others.

    `edit` is that `Edit`.
    """

    def __init__(self, message: str, edit: Any):
        super().__init__(message)
        self.edit = edit


class ModelError(ReknowError):
    """The model cannot be handled: choose another model, or follow the remedy in the message."""


class PatchError(ReknowError):
    """A patch does not fit the model or the stack it is used on."""


class EditFailed(ReknowError):
    """The computation broke down (NaN, singular system); the model and the disk are as before.

    `edit` is the `Edit` it broke down for, where the others are not concerned.
    """

    def __init__(self, message: str, edit: Any = None):
        super().__init__(message)
        self.edit = edit


class EngineError(ReknowError):
    """Processes or machines that share a work are lost, or end over it; what was made is kept."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what runs ends as after Ctrl-C."""


SINGLE_EDIT_ERRORS = (EditFailed, EditRefused, TextRefused)
"""What a run of many edits counts as the failure of one."""


class MissingExtra(ReknowError):
    """An optional dependency is not installed: the message names the pip command."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed; run: pip install 'reknow[{extra}]'"
        )


def did_you_mean(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for an unknown name: lists the nearest and all known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return InputError(f"unknown {kind} '{name}'.{hint} Known: {', '.join(known)}")
