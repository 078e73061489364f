"""When cases are read in the course of a run: its modes, and the names of the stages in rows and results."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

__all__ = [
    "AFTER_EDIT",
    "BEFORE",
    "END",
    "IN_CONTEXT",
    "UNEDITED",
    "Mode",
    "Stage",
    "checkpoint",
    "checkpoint_edits",
    "stage_label",
    "stage_order",
]

Mode = Literal["single", "batch", "sequential"]
"""Each case on the unedited model; all in one patch; one after the other, all kept."""

UNEDITED = "unedited"
"""The label under which the unedited model stands among the methods."""

BEFORE = "before"
"""Of the unedited model alone; it has no rows among those of the methods."""
AFTER_EDIT = "after_edit"
"""Right after the patch with the case's edits."""
IN_CONTEXT = "in_context"
"""The edit stands in front of every question; also read of the unedited model."""
END = "end"
"""After all edits of a batch or of a sequence."""
_CHECKPOINT = "at:"
"""After so many edits of a sequence."""

Stage = Annotated[str, Field(pattern=rf"^({AFTER_EDIT}|{IN_CONTEXT}|{END}|{_CHECKPOINT}[0-9]{{1,9}})$")]
"""A stage at which edited models are read."""


def checkpoint(edits: int) -> str:
    """The stage after so many edits of a sequence, which are not all."""
    return f"{_CHECKPOINT}{edits}"


def checkpoint_edits(stage: str) -> int | None:
    """After how many edits of a sequence the stage is; None where it is no checkpoint."""
    return int(stage.removeprefix(_CHECKPOINT)) if stage.startswith(_CHECKPOINT) else None


def stage_order(stage: str) -> float:
    """A key that sorts stages by time; those that are no part of a sequence come first."""
    return float("inf") if stage == END else checkpoint_edits(stage) or 0


def stage_label(stage: str) -> str:
    """A stage in words."""
    known = {
        BEFORE: "before",
        AFTER_EDIT: "right after the edit",
        IN_CONTEXT: "with the edit in front of the question",
        END: "after all edits",
    }
    return known.get(stage) or f"after {checkpoint_edits(stage)} edits"
