"""Patches and the changes of a stack in words and JSON values, for whoever looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from reknow.patching.history import Line, reordered
from reknow.patching.patches import Patch


def describe(patch: Patch) -> dict[str, Any]:
    """A patch as JSON values: everything but the numbers of its matrices."""
    return {
        "id": patch.id,
        "method": patch.method,
        "kind": patch.kind,
        "settings": patch.settings,
        "edits": [
            {key: value for key, value in asdict(edit).items() if value or value == ""} for edit in patch.edits
        ],
        "matrices": {
            name: {"shape": list(delta.shape), "rank": delta.rank, "norm": delta.norm()}
            for name, delta in patch.deltas.items()
        },
        "memory": {**patch.memory, "tensors": {name: list(tensor.shape) for name, tensor in patch.state.items()}},
        "follows": patch.follows,
        "base": {"structure": patch.base.structure, "tokenizer": patch.base.tokenizer, "dtype": patch.base.dtype},
        "made_on": list(patch.made_on),
        "notes": patch.notes,
        "version": patch.version,
    }


def describe_change(before: Line | None, line: Line) -> tuple[str, list[str]]:
    """What a line of a history says was done to the stack as the line before left it: the action, and a text for each
    patch that came or went, or for what else changed."""
    entry = line.entry
    if entry is None:
        return "?", ["it cannot be read"]
    done = [f"+ {one.id} {one.what}" for one in entry.applied] + [f"− {one}" for one in entry.reverted]
    if reordered(before, line):
        done.append(f"reordered: {describe_order(entry.patches)}")
    if before and before.entry and before.entry.base != entry.base:
        done.append(f"base: {entry.base}")
    return entry.action if entry.to is None else f"{entry.action} to {entry.to}", done


def describe_order(ids: Sequence[str]) -> str:
    return ", ".join(ids) + ", the newest last"


def utc(time: datetime) -> str:
    """The time to the second, in UTC."""
    return f"{time.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S}"
