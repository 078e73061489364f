"""What a tab of the page works on: a model, a stack in a folder of its own, and what was made last.

The address of the tab names its desk, so that a reload finds it again and two tabs have two. A patch that is switched
off is one that a change called `OFF` took out of the stack: the folder's history knows it, and nothing else has to.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from reknow.edits import Case
from reknow.errors import InputError, PatchError
from reknow.evaluation.tried import Tried
from reknow.files.locks import PATIENCE, write_lock
from reknow.files.outputs import STACK_FILE
from reknow.lm import LM
from reknow.patching.patches import Patch
from reknow.patching.stack import base_name, read_existing, read_history, read_stack, save_stack
from reknow.ui.work import PLAIN, Manner, Work

OFF, ON = "off", "on"
"""What the history calls switching."""
_NAME, _PRIVATE = re.compile(r"[a-z0-9][a-z0-9-]{3,60}"), re.compile(r"page-[0-9a-f]{32}")
_MOST = 200
"""Desks that are kept in memory; the stacks of others are in their folders."""


class Kept(NamedTuple):
    """A patch of a stack as the page lists it."""

    patch: Patch
    on: bool
    by: str
    at: datetime | None
    why: str


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
        """All patches of the stack with who put them on, the switched off ones at the places where they stood."""
        if not (self.folder / STACK_FILE).exists():
            return []
        told: dict[str, tuple[str, datetime, str]] = {}
        order: list[str] = []
        off: set[str] = set()
        for line in read_history(self.folder):
            if (entry := line.entry) is None:
                continue
            for one in entry.applied:
                if one.id not in off:
                    told[one.id] = entry.by, entry.at, entry.why
            off = (off | set(entry.reverted) if entry.action == OFF else off) - set(entry.patches)
            order = _merged(order, entry.patches, off)
        on = {patch.id: patch for patch in self.patches()}
        order = _merged(order, list(on), off - set(on))
        found = []
        for patch_id in order:
            patch = on.get(patch_id) or Patch.load(self.folder / f"{patch_id}.patch")
            by, at, why = told.get(patch_id, ("", None, ""))
            found.append(Kept(patch, patch_id in on, by, at, why))
        return found

    def change(
        self,
        lm: LM,
        action: str,
        make: Callable[[tuple[Patch, ...]], Sequence[Patch]],
        why: str = "",
    ) -> None:
        """Puts another list of patches into the folder, once it has been tried on the model.

        Raises:
            PatchError: the patches do not fit the model, or not behind each other.
        """
        with write_lock(self.folder, wait=PATIENCE):
            wanted = tuple(make(self.patches()))
            with lm.stacked(wanted):
                pass
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            save_stack(self.folder, self.model, wanted, action=action, why=why)

    def switch(self, lm: LM, patch_id: str, on: bool) -> None:
        """Switches a patch on or off; its place in the order stays.

        Raises:
            PatchError: there is none of this id, or a later version of its memory stands on it.
        """
        kept = self.kept()
        if patch_id not in [one.patch.id for one in kept]:
            raise PatchError(f"expected a patch of this stack; it has none of id {patch_id}: load the page again")
        wanted = [one.patch for one in kept if (on if one.patch.id == patch_id else one.on)]
        self.change(lm, ON if on else OFF, lambda _: wanted)


def _merged(order: Sequence[str], on: Sequence[str], off: set[str]) -> list[str]:
    """The ids that are on, in their order, between those that are off, which stay where they stood."""
    left = iter(on)
    stood = [patch_id for patch_id in order if patch_id in off or patch_id in on]
    found = [patch_id if patch_id in off else next(left) for patch_id in stood]
    return [*found, *left]


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
            self.first = re.sub(r"[^a-z0-9]+", "-", stack.resolve().name.lower()).strip("-").ljust(4, "0")
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
        desk = Desk(name, base_name(str(base)), self._place(name, base_name(str(base))))
        if beneath and not (desk.folder / STACK_FILE).exists():
            desk.folder.parent.mkdir(parents=True, exist_ok=True)
            save_stack(desk.folder, desk.model, beneath, action="apply", why=f"as {self._model} has it")
        return desk

    def take(self, desk: Desk, model: str) -> None:
        """Another base model for the desk: it has a stack for each.

        Raises:
            InputError: its stack is of one model for good, or the name is that of a stack.
        """
        base, beneath = read_stack(model)
        base = base_name(str(base))
        if beneath:
            raise InputError(
                f"expected a base model; {model} is a stack: start the page with reknow ui --stack {model}"
            )
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
