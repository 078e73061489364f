"""The stacks that are served, by name: folders that change meanwhile, by the server and by other programs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from reknow.errors import InputError, PatchError
from reknow.files.hub import is_address, local, read_address
from reknow.files.locks import PATIENCE, write_lock
from reknow.files.outputs import STACK_FILE, stack_folder
from reknow.model.fingerprint import Fingerprint
from reknow.patching.patches import Patch
from reknow.patching.stack import base_name, read_stack, save_stack, with_patch, without_patch

_Stack = tuple[Patch, ...]


class UnknownStack(InputError):
    """No stack of that name is served."""


class _Read(NamedTuple):
    """A stack as it was read from its folder."""

    version: tuple[int, ...] | None
    """Of `stack.json`; None: there is none."""
    patches: _Stack


def stack_names(stacks: Iterable[Path], base: str) -> dict[str, Path]:
    """Name → folder of each stack; a stack has the name of its folder, or of its repository on the hub.

    Raises:
        InputError: two have one name, or one that of the base model, or there is something else at that place.
    """
    named: dict[str, Path] = {}
    for stack in stacks:
        shared = is_address(stack)
        name = read_address(str(stack)).repository.rpartition("/")[2] if shared else stack.resolve().name
        if name in named or name == base:
            other = named.get(name, f"the base model {base}")
            raise InputError(
                f"expected a name of its own for the stack {stack}; {other} has it too: rename the folder"
            )
        named[name] = local(stack) if shared else stack_folder(stack)
    return named


class Stacks:
    """The stacks over one base model.

    Args:
        base: name of the base model, as stack folders have it.
        served_as: its name for who asks.
        fingerprint: of that model.
        folders: name → folder; where there is none yet, the first patch makes it.
        fixed: names of those that are not ours to change, as they come from the hub.
        check: puts patches on the model and raises PatchError where they do not fit.
    """

    def __init__(
        self,
        base: str,
        served_as: str,
        fingerprint: Fingerprint,
        folders: dict[str, Path],
        check: Callable[[_Stack], object],
        fixed: Collection[str] = (),
    ):
        self.served_as, self._fixed = served_as, fixed
        self._base, self._fingerprint, self._folders, self._check = base, fingerprint, folders, check
        self._known: dict[str, _Read] = {}
        self._there = {name for name, folder in folders.items() if _version(folder) is not None}
        """Names of the stacks whose folder was there once."""
        self._reading, self._changing = threading.Lock(), threading.Lock()

    @property
    def names(self) -> list[str]:
        """What may be asked for: the base model, and the stacks."""
        return [self.served_as, *self._folders]

    def patches(self, name: str) -> _Stack:
        """The patches of a stack as its folder has them now; none of the base model.

        Raises:
            UnknownStack: there is none of that name, or its folder is gone.
            PatchError: its folder is broken, or now one of another base.
        """
        if name == self.served_as:
            return ()
        folder = self._folder(name)
        with self._reading:
            known = self._known.get(name)
            if known is None or known.version != _version(folder):
                known = self._known[name] = self._read(name)
            return known.patches

    def add(self, name: str, patch: Patch, why: str = "") -> _Stack:
        """Puts the patch on top of the stack and into its folder; the stack.

        Raises:
            UnknownStack: there is none of that name.
            PatchError: the patch is not of this model, is there already, or does not fit.
        """
        return self._change(name, "apply", why, lambda stack: with_patch(stack, patch, self._fingerprint))

    def remove(self, name: str, patch_id: str, why: str = "") -> _Stack:
        """Takes the patch out of the stack, whose folder keeps its file; the stack.

        Raises:
            UnknownStack: there is none of that name.
            UnknownPatch: the stack has none of that id.
            PatchError: it is a version of a memory that is not the newest.
        """
        return self._change(name, "revert", why, lambda stack: without_patch(stack, patch_id))

    def _change(self, name: str, action: str, why: str, change: Callable[[_Stack], _Stack]) -> _Stack:
        folder = self._folder(name)
        if name in self._fixed:
            raise PatchError(
                f"expected a stack in a folder of this machine to change; {name} is read from the hub: pull it, and "
                "serve the folder"
            )
        with self._changing, write_lock(folder, wait=PATIENCE):
            changed = change(self._read(name).patches)
            self._check(changed)
            save_stack(folder, self._base, changed, action=action, why=why)
        return changed

    def _folder(self, name: str) -> Path:
        folder = self._folders.get(name)
        if folder is None:
            raise UnknownStack(
                f"expected the name of a stack; got {name!r}: there are {', '.join(self._folders) or 'none'}"
                f"{'' if name in self.names else f', and {self.served_as} without patches'}"
            )
        return folder

    def _read(self, name: str) -> _Read:
        """What the folder holds; its version is taken first, so that a change meanwhile is read the next time."""
        folder = self._folder(name)
        version = _version(folder)
        if version is not None:
            self._there.add(name)
        elif name in self._there:
            raise UnknownStack(f"expected the stack in {folder}; it is gone since it was served: put it back")
        base, patches = read_stack(folder)
        if version is not None and base_name(str(base)) != base_name(self._base):
            raise PatchError(
                f"expected a stack on {self._base}; {folder} is one on {base}: serve it by itself, with its own base"
            )
        return _Read(version, tuple(patches))


def _version(folder: Path) -> tuple[int, ...] | None:
    """What tells one `stack.json` from the next, which is another file; None: there is none."""
    try:
        found = os.stat(folder / STACK_FILE)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
