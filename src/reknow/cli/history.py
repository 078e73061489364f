"""Commands that change a stack folder, and those on its history: apply, revert, log."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.options import Json, Opening, check_model, refuse_beside
from reknow.cli.stacks import number_of_patches
from reknow.cli.terminal import say, say_json, say_table, warn
from reknow.errors import InputError
from reknow.files.locks import PATIENCE, write_lock

if TYPE_CHECKING:
    from reknow.patching.history import Line
    from reknow.patching.patches import Patch

_Changed = Annotated[Path, typer.Option("--stack", help="The stack folder: a base model and its patches in order.")]
_Why = Annotated[str, typer.Option("--why", help="For the history: the reason.", show_default=False)]
_Stack = Annotated[Path, typer.Argument(help="A stack: a folder or hub:owner/name.", show_default=False)]


def apply(
    patches: Annotated[list[Path], typer.Argument(help="Patches: files, or hub:owner/name.", show_default=False)],
    stack: _Changed,
    model: Annotated[
        str | None, typer.Option("--model", help="The base model; needed for a new stack.", callback=check_model)
    ] = None,
    *,
    opening: Opening,
    force: Annotated[bool, typer.Option("--force", help="Patches of another base too, at your own risk.")] = False,
    why: _Why = "",
) -> None:
    """Put patches on top of a stack folder, which is made if it does not exist.

    The folder opens as an edited model: `LM(folder)`, or --model FOLDER in other commands. Where the --model of a new
    stack is a stack itself, the new one has the same base and begins with the same patches.
    """
    from reknow.files.outputs import stack_folder
    from reknow.patching.patches import Patch
    from reknow.patching.stack import FORCED, save_stack, with_patch

    stack = stack_folder(stack)
    loaded = [Patch.load(path) for path in patches]
    with write_lock(stack, wait=PATIENCE):
        source, base, active = _found(stack, model)
        before = len(active)
        fingerprint = next((patch.base for patch in active if FORCED not in patch.notes), None)
        if fingerprint is None or force:
            lm = opening.open(source)
            for patch in loaded:
                lm.apply(patch, force=force)
            active = list(lm.patches)
        else:
            for patch in loaded:
                active = list(with_patch(tuple(active), patch, fingerprint))
        save_stack(stack, base, active, action="apply", why=why)
    if before and source == model:
        say(f"{stack} begins with what {model} has: {number_of_patches(before)}")
    for patch in active[before:]:
        say(f"applied {patch.label}")
    say(f"{stack}: {base} with {number_of_patches(len(active))}")


def _found(stack: Path, model: str | None) -> tuple[str, str, list[Patch]]:
    """What is opened to put patches on a stack, its base and its patches; for a new stack those of `model`."""
    from reknow.patching.stack import base_name, read_stack

    base, active = read_stack(stack)
    if base == stack:
        if model is None:
            raise InputError(f"expected --model for the new stack {stack}; got none: name the base model")
        base, beneath = read_stack(os.path.expanduser(model))
        return model, str(base), beneath
    if model is not None and base_name(model) != base:
        raise InputError(f"expected the base of {stack}, which is {base}; got {model}: leave --model out")
    return str(stack), str(base), active


def revert(
    stack: _Changed,
    patches: Annotated[
        list[str], typer.Argument(help="Ids, patch files, or hub:owner/name.", show_default=False)
    ] = [],  # noqa: B006
    to: Annotated[
        str | None, typer.Option("--to", help="Instead: the id of a line of the history or of a patch, or a time.")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the later edits of a memory again.")] = False,
    why: _Why = "",
    *,
    opening: Opening,
) -> None:
    """Take patches out of a stack folder, in any order, or bring it back to what it was. Their files stay."""
    from reknow.files.hub import is_address
    from reknow.files.outputs import stack_folder
    from reknow.patching.history import in_another_order
    from reknow.patching.patches import Patch
    from reknow.patching.stack import patches_at, read_existing, save_stack, without_patch
    from reknow.patching.telling import describe_order

    stack = stack_folder(stack)
    if to is None and not patches:
        raise InputError("expected patches to take out, or --to; got neither: name ids or files, see `reknow show`")
    if to is not None:
        refuse_beside("--to", {"patches": patches, "--rebuild": rebuild})
    with write_lock(stack, wait=PATIENCE):
        base, active = read_existing(stack)
        ids = [Patch.load(name).id if is_address(name) or Path(name).exists() else name for name in patches]
        rest, line = tuple(active), None
        lm = opening.open(str(stack)) if rebuild else None
        for patch_id in ids:
            if lm is None:
                rest = without_patch(rest, patch_id)
            else:
                lm.rebuild(without=patch_id)
                rest = lm.patches
        if to is not None:
            line, rest = patches_at(stack, to)
        action, state = "rebuild" if rebuild else "revert", None if line is None else line.id
        save_stack(stack, base, rest, action=action, why=why, to=state)  # notes nothing where they are the same
    if line is not None and [patch.id for patch in rest] == [patch.id for patch in active]:
        return say(f"nothing to do, so nothing is noted: {stack} {_as_after(line, 'is')}")
    for patch in active:
        if patch not in rest and (to or patch.id in ids):
            say(f"reverted {patch.label}")
    for patch in rest:
        if to and patch not in active:
            say(f"applied {patch.label}")
    if to and in_another_order([patch.id for patch in active], order := [patch.id for patch in rest]):
        say(f"reordered: {describe_order(order)}")
    if line is not None:
        say(_as_after(line))
    say(f"{stack}: {base} with {number_of_patches(len(rest))}")


def log(stack: _Stack, as_json: Json = False) -> None:
    """Say who changed a stack, when, how and why, the oldest change first.

    A line that was changed since it was written is named; `reknow verify` checks more.
    """
    from reknow.files.hub import local
    from reknow.patching.stack import read_history
    from reknow.patching.telling import describe_change, utc

    lines = read_history(local(stack))
    if as_json:
        return say_json([line.entry.model_dump(mode="json") for line in lines if line.entry])
    rows = []
    for before, line in zip([None, *lines], lines, strict=False):
        if (entry := line.entry) is None:
            rows.append([line.id, "?", "?", "?", "it cannot be read", ""])
            continue
        action, done = describe_change(before, line)
        rows.append([line.id, utc(entry.at), entry.by, action, "\n".join(done), entry.why])
    if rows:
        say_table(["id", "when (UTC)", "who", "what", "patches", "why"], rows)
    else:
        say(f"{stack} has no history: it was written before there was one, and begins with its next change")
    for line in lines:
        if line.problem:
            warn(f"line {line.number} of the history: {line.problem}")


def _as_after(line: Line, verb: str = "") -> str:
    """To which line's state a stack went back."""
    from reknow.patching.telling import utc

    time = f" of {utc(line.entry.at)} UTC" if line.entry else ""
    return f"{verb} as after line {line.number}, {line.id},{time}".strip()
