"""What a tab of the page works on: a model, a stack in a folder of its own, and what was made last.

The address of the tab names its desk, so that a reload finds it again and two tabs have two.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from reknow.edits import Case
from reknow.errors import InputError, PatchError, ReknowError
from reknow.evaluation.tried import Tried
from reknow.files.locks import PATIENCE, write_lock
from reknow.files.outputs import STACK_FILE
from reknow.lm import LM
from reknow.patching.patches import Patch
from reknow.patching.stack import (
    base_name,
    patches_at,
    read_existing,
    read_history,
    read_stack,
    save_stack,
    with_patch,
    without_patch,
)
from reknow.ui.kept import OFF, ON, Kept, listings, read_kept
from reknow.ui.work import PLAIN, Manner, Work, applied

_LONGEST = 60
"""Characters that a desk's name takes of the folder that it is."""
_NAME, _PRIVATE = re.compile(r"[a-z0-9][a-z0-9-]{3,60}"), re.compile(r"page-[0-9a-f]{32}")
_MOST = 200
"""Desks that are kept in memory; the stacks of others are in their folders."""


def put_on(patches: Iterable[Patch], lm: LM, stack: tuple[Patch, ...] = ()) -> tuple[Patch, ...]:
    """The stack with these patches on top, one after the other; warns and raises as `with_patch`."""
    for patch in patches:
        stack = with_patch(stack, patch, lm.fingerprint)
    return stack


@dataclass(frozen=True)
class Wish:
    """What the form of the first screen asks for."""

    prompt: str = ""
    subject: str = ""
    target: str = ""
    true: str = ""
    method: str = "rome"
    layer: str = ""
    case: Case | None = None
    """The bundled case from which it was filled in."""


class RunsPage(NamedTuple):
    """Runs that were read for the last screen."""

    chosen: tuple[str, ...]
    """Those of the list."""
    typed: str
    """The path of another one."""
    html: str
    """Their page."""


@dataclass
class Desk:
    """What a tab works on."""

    name: str
    model: str
    """Name of the base model, as it is opened."""
    folder: Path
    """Of the stack; there is none before its first patch."""
    fixed: bool = False
    """Whether the folder was there before the page, so that no other model can be taken."""
    work: Work | None = None
    wish: Wish = field(default_factory=Wish)
    tried: Tried | None = None
    """What was tried last, and is not in the stack."""
    runs: RunsPage | None = None
    shown: dict[str, Any] = field(default_factory=dict)
    """What other screens made last, by their names."""

    @property
    def busy(self) -> bool:
        return self.work is not None and self.work.running

    def start(self, what: str, task: Callable[[], object], manner: Manner = PLAIN) -> Work:
        """Begins a work; raises InputError while another one goes on."""
        if self.work is not None and self.work.running:
            raise InputError(
                f"expected one work at a time in a tab; “{self.work.state.what}” goes on: wait for it, or cancel it"
            )
        self.work = Work(what, task, manner)
        return self.work

    # --- the stack ------------------------------------------------------------------------------------------

    def patches(self) -> tuple[Patch, ...]:
        """Those that are on, in order.

        Raises:
            PatchError: the folder is broken.
        """
        return tuple(read_existing(self.folder)[1]) if (self.folder / STACK_FILE).exists() else ()

    def kept(self) -> list[Kept]:
        """All patches of the stack, those that are switched off too.

        Raises:
            PatchError: the folder is broken.
        """
        return read_kept(self.folder)

    def change(
        self,
        lm: LM,
        action: str,
        make: Callable[[tuple[Patch, ...]], Sequence[Patch]],
        why: str = "",
        **noted: Any,
    ) -> None:
        """Puts another list of patches into the folder, once it has been tried on the model.

        Args:
            make: gives it for the patches that are on, as the folder has them now, and warns of what there is to warn
                of; nobody else writes meanwhile.
            noted: what else `save_stack` is to note.

        Raises:
            PatchError: the patches do not fit the model, or not behind each other.
        """
        with write_lock(self.folder, wait=PATIENCE):
            wanted = tuple(make(self.patches()))
            with applied(lm, wanted):
                pass
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            save_stack(self.folder, self.model, wanted, action=action, why=why, **noted)

    def switch(self, lm: LM, patch_id: str, on: bool, why: str = "") -> None:
        """Switches a patch on or off; its place in the order stays. Nothing is done where it is so already.

        Raises:
            PatchError: there is none of this id, or a later version of its memory stands on it.
        """
        with write_lock(self.folder, wait=PATIENCE):
            if self._find(patch_id).on == on:
                return
            if not on:
                return self.change(lm, OFF, lambda stack: without_patch(stack, patch_id), why)
            wanted = [one.patch for one in self.kept() if one.on or one.patch.id == patch_id]
            self.change(lm, ON, lambda _: put_on(wanted, lm), why)

    def take_out(self, lm: LM, patch_id: str, why: str = "") -> None:
        """Takes a patch out for good, so far as the list goes: its file stays, and the history can bring it back.

        Raises:
            PatchError: there is none of this id, or a later version of its memory stands on it.
        """
        with write_lock(self.folder, wait=PATIENCE):
            if self._find(patch_id).on:
                return self.change(lm, "revert", lambda stack: without_patch(stack, patch_id), why)
            self.change(lm, "revert", lambda stack: stack, why, forgotten=[patch_id])

    def go_back(self, lm: LM, line_id: str, why: str = "") -> None:
        """Brings the stack back to what it was after a line of its history, switched off patches too. Nothing is done
        where it is so already.

        Raises:
            InputError: there is no such line.
            PatchError: the file of a patch is gone.
        """
        with write_lock(self.folder, wait=PATIENCE):
            line, patches = patches_at(self.folder, line_id)
            entries = [each.entry for each in read_history(self.folder) if each.entry]
            listed = listings(entries)
            if line.entry and listed[line.entry.hash] == listed[entries[-1].hash]:
                return
            self.change(lm, "revert", lambda _: put_on(patches, lm), why, to=line.id, forgotten=[])

    def _find(self, patch_id: str) -> Kept:
        found = next((one for one in self.kept() if one.patch.id == patch_id), None)
        if found is None:
            raise PatchError(f"expected a patch of this stack; it has none of id {patch_id}: load the page again")
        return found


class Desks:
    """The desks, by name.

    Args:
        folder: where stacks of new desks go.
        model: what a new desk begins with: a base model, or a stack, whose patches it begins with too.
        stack: a stack folder that is a desk from the beginning, under its folder's name.
        private: whether names are such as nobody guesses, and no others are taken.
    """

    def __init__(self, folder: Path, model: str, stack: Path | None = None, *, private: bool = False):
        self._folder, self._model, self._lock = folder, model, threading.Lock()
        self._form, self._bytes = (_PRIVATE, 16) if private else (_NAME, 6)
        self._desks: dict[str, Desk] = {}
        self.first: str | None = None
        """The name of the desk of `stack`."""
        if stack is not None:
            name = re.sub(r"[^a-z0-9]+", "-", stack.resolve().name.lower())[:_LONGEST].strip("-")
            self.first = name.ljust(4, "0")
            base, _ = read_existing(stack)
            self._desks[self.first] = Desk(self.first, base, stack, fixed=True)

    def open(self, name: str | None) -> Desk:
        """The desk of that name, which is made where there is none; a new name where this can be none."""
        with self._lock:
            if name is None or not self._form.fullmatch(name):
                name = self.first if name is None and self.first else f"page-{secrets.token_hex(self._bytes)}"
            desk = self._desks.pop(name, None) or self._new(name)
            self._desks[name] = desk  # the last used goes last
            for old in list(self._desks)[:-_MOST]:
                if not (self._desks[old].fixed or self._desks[old].busy):
                    del self._desks[old]
            return desk

    def known(self, name: str) -> Desk | None:
        """The desk of that name, where it is in memory."""
        with self._lock:
            return self._desks.get(name)

    def cancel(self) -> list[Work]:
        """Asks all works to end; those that still run."""
        with self._lock:
            works = [desk.work for desk in self._desks.values() if desk.work is not None and desk.work.running]
        for work in works:
            work.cancel()
        return works

    def _new(self, name: str) -> Desk:
        base, beneath = read_stack(self._model)
        if (last := self._last_model(name)) not in (None, base_name(str(base))):
            return Desk(name, last, self._place(name, last))
        desk = Desk(name, base_name(str(base)), self._place(name, base_name(str(base))))
        if beneath and not (desk.folder / STACK_FILE).exists():
            desk.folder.parent.mkdir(parents=True, exist_ok=True)
            save_stack(desk.folder, desk.model, beneath, action="apply", why=f"as {self._model} has it")
        return desk

    def _last_model(self, name: str) -> str | None:
        """The model on which the desk's stack was changed last, when the page ran before; None: there is no stack."""
        files = [file for file in (self._folder / name).glob(f"*/{STACK_FILE}") if file.is_file()]
        for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
            with suppress(ReknowError):  # one that is broken is told of where its model is taken
                base = base_name(read_existing(file.parent)[0])
                if self._place(name, base) == file.parent:  # not an export that lies beside the stacks
                    return base
        return None

    def take(self, desk: Desk, model: str) -> None:
        """Another base model for the desk: it has a stack for each.

        Raises:
            InputError: its stack is of one model for good, or the name is that of a stack.
        """
        base, beneath = read_stack(model)
        base = base_name(str(base))
        if beneath:
            raise InputError(f"expected a base model; {model} is a stack: open it with `reknow ui {model}`")
        if base == desk.model:
            return
        if desk.fixed:
            raise InputError(f"expected {desk.model}, on which {desk.folder} is; got {model}: open a tab of its own")
        desk.model, desk.folder = base, self._place(desk.name, base)
        desk.tried, desk.shown = None, {}

    def _place(self, name: str, base: str) -> Path:
        slug = re.sub(r"\W+", "-", base).strip("-")[-60:]
        if "/" in base or "\\" in base:  # two paths may read alike
            slug += f"-{hashlib.sha256(base.encode()).hexdigest()[:6]}"
        return self._folder / name / slug
