"""A stack: the ordered patches over one base model, and the folder that keeps it with its history."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from reknow.checks.arguments import typed
from reknow.edits import check_encodable
from reknow.errors import InputError, PatchError
from reknow.files.atomic import restore_interrupted, write_text
from reknow.files.digests import file_digest
from reknow.files.hub import fetch, is_address, read_address
from reknow.files.locks import PATIENCE, write_lock
from reknow.files.outputs import STACK_FILE, stack_folder
from reknow.files.schema import Listed, NewerFormat, Strict, explain, read_json
from reknow.files.strict_json import strict_json
from reknow.model.fingerprint import Fingerprint
from reknow.patching.history import Line, complete, find_line, make_line, read_lines, with_last
from reknow.patching.patches import Patch

_FORMAT = 2
FORCED = "forced"
"""The note of a patch that was put on another base than its own: structure and tokenizer of that one."""


class UnknownPatch(PatchError):
    """A stack has no patch of that id."""


def _each_once(names: list[str]) -> list[str]:
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"expected every patch once, and {twice[0]} is there twice")
    return names


_PATCH = ".patch"
_PatchName = Annotated[str, Field(pattern=r"^[^/\\\x00]+\.patch$", max_length=255)]
"""A file in the stack's own folder."""


class _StackFile(Strict):
    """What is in `stack.json`."""

    format: Annotated[int, Field(ge=1, le=_FORMAT)]
    base: Annotated[str, Field(min_length=1)]
    """Name or path of the base model."""
    patches: Annotated[Listed[_PatchName], AfterValidator(_each_once)]
    """Files of the patches in the order in which they are applied."""
    last: str | None = None
    """The last line of the history, with which this file was written; None before format 2."""

    @property
    def ids(self) -> list[str]:
        """Of the patches, in order."""
        return [name.removesuffix(_PATCH) for name in self.patches]


def with_patch(
    stack: tuple[Patch, ...], patch: Patch, base: Fingerprint, *, force: bool = False
) -> tuple[Patch, ...]:
    """The stack with the patch on top; warns where the patch was made on another stack.

    Raises:
        PatchError: made on another model than `base` (`force` overrides, and so does the note of it), already in the
            stack, or a memory that continues another version than the newest in the stack.
    """
    active = tuple(p.id for p in stack)
    if patch.id in active:
        raise PatchError(f"expected a patch that is not applied yet; {patch.label} is: revert it first")
    if not force and patch.notes.get(FORCED) != _identity(base):
        patch.base.check(base, patch.label)
    newest = [p.id for p in stack if p.kind != "weights" and p.method == patch.method]
    if patch.kind != "weights" and patch.follows != (newest[-1] if newest else None):
        raise PatchError(
            f"expected the {patch.method} memory that {patch.label} continues ({patch.follows or 'an empty one'}); "
            f"the newest version applied is {newest[-1] if newest else 'none'}: apply or revert to that one, or make "
            "the edit again on this stack"
        )
    if patch.made_on != active and patch.made_on:
        warnings.warn(
            f"{patch.label} was made on top of {len(patch.made_on)} patches and is applied on {len(active)}: "
            "its effect may differ",
            stacklevel=4,
        )
    return (*stack, patch)


def note_force(patch: Patch, base: Fingerprint) -> None:
    """Notes in the patch that it was put on this base, if that is not its own: a stack with it opens again."""
    if patch.base.difference(base):
        patch.notes[FORCED] = _identity(base)


def _identity(base: Fingerprint) -> list[str]:
    return [base.structure, base.tokenizer]


def without_patch(stack: tuple[Patch, ...], wanted: str) -> tuple[Patch, ...]:
    """The stack without the patch of this id; warns where later ones were made on top of it.

    Raises:
        UnknownPatch: it is not in the stack.
        PatchError: it is a version of a memory that is not the newest.
    """
    if wanted not in (ids := [p.id for p in stack]):
        raise UnknownPatch(
            f"expected the id of an applied patch; got {wanted}; applied: {', '.join(ids) or 'none'}: give one"
        )
    if later := [p for p in stack if p.follows == wanted]:
        raise PatchError(
            f"expected the newest version of the {later[0].method} memory; {later[0].label} continues {wanted}: "
            "revert from the newest on, or rebuild without it, which makes the later edits again "
            f'(`lm.rebuild(without="{wanted}")`; on the command line --rebuild)'
        )
    later = [p.label for p in stack if wanted in p.made_on]
    if later:
        warnings.warn(f"{', '.join(later)}: made on top of {wanted}, the effect may differ", stacklevel=4)
    return tuple(p for p in stack if p.id != wanted)


@typed
def save_stack(
    folder: str | Path,
    base: str,
    patches: Sequence[Patch],
    *,
    action: str = "save",
    why: str = "",
    to: str | None = None,
    forgotten: Sequence[str] | None = None,
) -> Path:
    """Writes a stack folder: a reference to the base model, the patches in order, and a line of its history, which
    `read_history` gives. `LM(folder)` opens it.

    Files of patches that were taken out stay in the folder; only those that `stack.json` names are applied. To change
    what is there, hold `locks.write_lock(folder)` from the reading on, so that no other change is lost. Where the
    patches are those that are there, it is no change. Where a line of the history is not as it was written, a warning
    says so, and the change is made all the same.

    Args:
        action: what the history calls the change.
        why: for whoever reads the history.
        to: the id of the line of the history to whose state this goes back.
        forgotten: ids of patches that are not applied and that the line calls reverted all the same, for who knows by
            the history what to put on again; None: where the patches are those that are there, no line is written.

    Raises:
        InputError: it cannot be written, others write there for ten minutes, or `base` is itself a stack.
        PatchError: what is there is no stack, or its history ends with another line than `stack.json` says.
    """
    folder, base = stack_folder(folder), base_name(base)
    check_encodable("why", why)
    names = [f"{patch.id}{_PATCH}" for patch in patches]
    with write_lock(folder, wait=PATIENCE):
        old = _stack_file(folder)
        if old is None or old.base != base:
            _check_base(base)
        for name, patch in zip(names, patches, strict=True):
            if not _holds(folder / name, patch):
                patch.save(folder / name)
        end = complete(folder, old.last if old else None)
        if old is not None:
            _warn_of_history(folder)
        before = old.ids if old else []
        if old and old.last and forgotten is None and (old.base, old.patches) == (base, names):
            line = old.last
        else:
            digests = {p.id: file_digest(folder / f"{p.id}{_PATCH}") for p in patches if p.id not in before}
            gone = forgotten or ()
            line = make_line(end, base, before, patches, digests, action=action, why=why, to=to, forgotten=gone)
        stack = {"format": _FORMAT, "base": base, "patches": names, "last": line}
        write_text(folder / STACK_FILE, strict_json(stack, indent=1, ensure_ascii=False))
        try:
            complete(folder, line)
        except InputError as error:  # the stack is changed, and stack.json holds the line
            warnings.warn(f"{error}; the next change of the stack adds the line", stacklevel=3)
    return folder


def _warn_of_history(folder: Path) -> None:
    """Says before a change that the history in front of it is not as it was written; the change is made all the same,
    since a line more takes nothing away of what shows that."""
    if wrong := [line for line in read_history(folder) if line.problem]:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        warnings.warn(
            f"line {wrong[0].number} of the history of {folder}: {wrong[0].problem}{more}; changes are made all the "
            f"same, `reknow verify {folder}` examines all",
            stacklevel=4,
        )


def _check_base(base: str) -> None:
    if is_address(base) or _stack_file(base) is not None:
        raise InputError(
            f"expected a base model; {base} is a stack, and what names it as its base does not open: give the base "
            "of that one, and its patches in front of the new ones (`read_stack` gives both)"
        )


def read_history(folder: str | Path) -> list[Line]:
    """The changes of a stack, the oldest first, each with what is wrong with it; none where it has no history.

    Raises:
        PatchError: there is no stack folder, or its files cannot be read.
    """
    while True:
        stack = _stack_file(folder)
        if stack is None:
            raise _missing(folder)
        lines = with_last(read_lines(Path(folder)), stack.last, stack.ids, Path(folder) / STACK_FILE)
        if _stack_file(folder) == stack:  # else another process has changed it meanwhile
            return lines


def file_problems(folder: str | Path) -> list[str]:
    """What is wrong with the files of the patches in a stack: one is gone, damaged, or not as it was applied.

    Raises:
        PatchError: there is no stack folder.
    """
    stack = _stack_file(folder)
    if stack is None:
        raise _missing(folder)
    entries = [line.entry for line in read_history(folder) if line.entry]
    applied = {one.id: one.sha256 for entry in entries for one in entry.applied}
    problems = []
    for name, patch_id in zip(stack.patches, stack.ids, strict=True):
        try:
            _load_named(file := Path(folder) / name)
            if applied.get(patch_id, now := file_digest(file)) != now:
                problems.append(f"{file} holds the patch {patch_id} in other bytes than when it was applied")
        except PatchError as error:
            problems.append(str(error))
    return problems


def patches_at(folder: str | Path, wanted: str) -> tuple[Line, list[Patch]]:
    """The line of the history that an id or a time names, see `find_line`, and the patches of the stack after it.

    Raises:
        InputError: it names none.
        PatchError: there is no stack folder, or the file of a patch is gone.
    """
    line = find_line(read_history(folder), wanted)
    ids = line.entry.patches if line.entry else []
    return line, [_load_named(Path(folder) / f"{patch_id}{_PATCH}") for patch_id in ids]


def _holds(file: Path, patch: Patch) -> bool:
    """Whether the patch is what is in the file of its name: an id is computed from the content."""
    try:
        return file.exists() and Patch.load(file).id == patch.id
    except PatchError:
        return False


def base_name(base: str) -> str:
    """How a stack folder names its base: a folder by its whole path, anything else as it is."""
    return str(Path(base).resolve()) if Path(base).exists() else base


def read_stack(source: str | Path) -> tuple[str | Path, list[Patch]]:
    """(base model, patches) of a stack folder, or of one on the hub (`hub:owner/name[@revision]`); any other source
    comes back as it is, with no patches."""
    folder = fetch(read_address(str(source))) if is_address(source) else source
    stack = _stack_file(folder)
    if stack is None and folder is not source:
        raise PatchError(
            f"expected a stack at {source}; it is none: put patches on with --patch, or `reknow pull` it"
        )
    if stack is None:
        return source, []
    return stack.base, [_load_named(Path(folder) / name) for name in stack.patches]


def read_existing(stack: str | Path) -> tuple[str, list[Patch]]:
    """Base and patches of a stack folder; raises PatchError where there is none."""
    base, patches = read_stack(stack)
    if base == stack:
        raise _missing(stack)
    return str(base), patches


def applied_ids(stack: str | Path) -> list[str]:
    """Ids of the patches of a stack folder, in order, whose files are not read; raises PatchError where there is no
    such folder."""
    found = _stack_file(stack)
    if found is None:
        raise _missing(stack)
    return found.ids


def _missing(folder: str | Path) -> PatchError:
    return PatchError(f"expected a stack folder at {folder}; there is none: make it with `reknow apply`")


def _stack_file(source: str | Path) -> _StackFile | None:
    """What `stack.json` of a folder says; None where there is none."""
    restore_interrupted(source)
    file = Path(source) / STACK_FILE
    if not str(source).strip() or not os.path.isfile(file):  # a name may be too long for a path
        return None
    return read_json(file, _StackFile, lambda error: _refusal(source, error))


def _load_named(file: Path) -> Patch:
    """The patch in the file, whose name is its id."""
    patch = Patch.load(file)
    if patch.id != file.stem:
        raise PatchError(
            f"expected the patch {file.stem} in {file}; it holds {patch.label}: put the right file there, or take it "
            "out of the stack and apply it under its own name"
        )
    return patch


def _refusal(source: str | Path, error: Exception) -> PatchError:
    if isinstance(error, NewerFormat):
        return PatchError(f"expected stack format {_FORMAT}; {source} has {error}: upgrade reknow")
    return PatchError(f"expected a stack folder at {source}; {STACK_FILE} is broken ({explain(error)}): restore it")
