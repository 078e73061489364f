"""Stages: their names are read as they are written, sort by time, and have words."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from reknow.evaluation.stages import (
    AFTER_EDIT,
    BEFORE,
    END,
    IN_CONTEXT,
    Stage,
    checkpoint,
    checkpoint_edits,
    stage_label,
    stage_order,
)

ORDER = [AFTER_EDIT, checkpoint(2), checkpoint(10), END]


def test_stages_sort_by_time_and_checkpoints_say_their_edits():
    assert sorted(reversed(ORDER), key=stage_order) == ORDER
    assert [checkpoint_edits(stage) for stage in ORDER] == [None, 2, 10, None]
    assert len({stage_label(stage) for stage in (BEFORE, IN_CONTEXT, *ORDER)}) == 6
    assert stage_label(checkpoint(10)) == "after 10 edits"


def test_rows_have_the_stages_of_edited_models_alone():
    stage = TypeAdapter(Stage)
    assert [stage.validate_python(name) for name in (IN_CONTEXT, *ORDER)] == [IN_CONTEXT, *ORDER]
    for name in (BEFORE, "at:", "at:x", "at:1234567890", "later", "end "):
        with pytest.raises(ValidationError):
            stage.validate_python(name)
